"""ResidentStorage: contents locked in RAM, growth, refusals."""

from __future__ import annotations

import errno
import logging
import os
import resource
from pathlib import Path

import pytest

from qcowfuse.storage.file import open_file_storage
from qcowfuse.storage.measuring import memory as memory_module
from qcowfuse.storage.measuring.memory import ResidentStorage, available_bytes, lockable_bytes

MIB = 1 << 20


async def make(path: Path, contents: bytes, *, writable: bool = True) -> ResidentStorage:
    """A resident storage on a new file."""
    path.write_bytes(contents)
    inner = await open_file_storage(str(path), writable=writable)
    try:
        return ResidentStorage(inner)
    except BaseException:
        await inner.aclose()
        raise


def locked_kib() -> int:
    """VmLck of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmLck:")[1].split()[0])


async def test_the_file_is_locked_in_memory(tmp_path: Path) -> None:
    """VmLck rises by the length of the file while it is open."""
    before = locked_kib()
    storage = await make(tmp_path / "image", bytes(3 * MIB))
    assert locked_kib() - before == 3 * 1024
    assert storage.resident_bytes == 3 * MIB
    await storage.aclose()
    await storage.aclose()
    assert locked_kib() == before


async def test_reads_and_writes(tmp_path: Path) -> None:
    """Reads see writes at once, inside the mapping, over its end and behind it; the length stays exact."""
    path = tmp_path / "image"
    storage = await make(path, b"a" * 10_000)
    assert storage.try_pwritev(100, [b"bc", b"d"])
    assert storage.try_pread(99, 5) == b"abcda"
    assert storage.try_pwritev(9_998, [b"WXYZ"])
    assert storage.try_pread(9_997, 8) == b"aWXYZ\0\0\0"
    await storage.pwritev(20_000, [b"end"])
    buffer = bytearray(b"\xff" * 10)
    assert storage.try_pread_into(19_995, memoryview(buffer))
    assert buffer == bytes(5) + b"end" + bytes(2)
    assert storage.try_pread_into(100, memoryview(buffer))
    assert buffer == b"bcd" + b"a" * 7
    assert await storage.pread(100, 3) == b"bcd"
    assert storage.size() == 20_003
    await storage.flush()
    assert (storage.counters.reads, storage.counters.writes, storage.counters.flushes) == (5, 3, 1)
    await storage.aclose()
    assert path.stat().st_size == 20_003


async def test_holes_and_zeroes_show_in_the_mapping(tmp_path: Path) -> None:
    """What is zeroed, punched or cut off reads as zeroes, also when the file grows again."""
    storage = await make(tmp_path / "image", b"z" * 100_000)
    await storage.write_zeroes(8192, 4096)
    await storage.punch_hole(65536, 8192)
    assert storage.try_pread(8191, 4098) == b"z" + bytes(4096) + b"z"
    assert storage.try_pread(65535, 8194) == b"z" + bytes(8192) + b"z"
    await storage.truncate(5000)
    assert storage.try_pread(4999, 10_000) == b"z" + bytes(9_999)
    await storage.truncate(90_000)
    assert storage.try_pread(4999, 80_000) == b"z" + bytes(79_999)
    await storage.aclose()


async def test_growth_is_locked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the file has grown by a step, the mapping covers it all; an empty file starts with none."""
    monkeypatch.setattr(memory_module, "GROWTH_STEP", MIB)
    storage = await make(tmp_path / "image", b"")
    assert storage.resident_bytes == 0
    assert storage.try_pread(0, 4) == bytes(4)
    assert storage.try_pwritev(0, [b"1" * (MIB - 1)])
    assert storage.resident_bytes == 0
    assert storage.try_pwritev(MIB - 1, [b"23"])
    assert storage.resident_bytes == MIB + 1
    assert storage.try_pread(MIB - 2, 4) == b"123\0"
    await storage.aclose()


async def test_growth_that_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It goes on from the page cache, with one warning."""
    storage = await make(tmp_path / "image", b"s" * 4096)
    monkeypatch.setattr(memory_module, "GROWTH_STEP", MIB)
    monkeypatch.setattr(memory_module, "available_bytes", lambda: 0)
    with caplog.at_level(logging.WARNING):
        for n in range(1, 4):
            assert storage.try_pwritev(n * 2 * MIB, [b"grown"])
    assert len(caplog.records) == 1
    assert storage.try_pread(4 * MIB, 5) == b"grown"
    assert storage.try_pread(4095, 2) == b"s\0"
    await storage.aclose()


async def test_refused_when_there_is_not_enough_ram(tmp_path: Path) -> None:
    """ENOMEM with both sizes, before anything is read: a sparse file larger than the RAM that is left."""
    path = tmp_path / "image"
    path.touch()
    n_bytes = available_bytes() + (1 << 30)
    os.truncate(path, n_bytes)
    inner = await open_file_storage(str(path), writable=True)
    with pytest.raises(OSError, match=rf"{n_bytes / MIB:.1f} MiB.*MiB of RAM are available") as caught:
        ResidentStorage(inner)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOMEM, str(path))
    await inner.aclose()


async def test_refused_by_the_limit_on_locked_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOMEM that names RLIMIT_MEMLOCK and both sizes."""
    monkeypatch.setattr(memory_module, "lockable_bytes", lambda: 64 << 10)
    with pytest.raises(OSError, match=r"1\.0 MiB, and RLIMIT_MEMLOCK .* 0\.1 MiB") as caught:
        await make(tmp_path / "image", bytes(MIB))
    assert caught.value.errno == errno.ENOMEM


def test_lockable_bytes_is_the_soft_limit() -> None:
    """With the capability there is no limit; without it, it is RLIMIT_MEMLOCK."""
    effective = int(Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0], 16)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = effective >> 14 & 1 or soft == resource.RLIM_INFINITY
    assert lockable_bytes() == (None if unlimited else soft)


async def test_read_only(tmp_path: Path) -> None:
    """Reads work, writes are EBADF."""
    storage = await make(tmp_path / "image", b"r" * 5000, writable=False)
    assert storage.try_pread(4998, 4) == b"rr\0\0"
    assert storage.try_pwritev(0, [b"x"]) is False
    with pytest.raises(OSError) as caught:
        await storage.pwritev(0, [b"x"])
    assert caught.value.errno == errno.EBADF
    await storage.aclose()
