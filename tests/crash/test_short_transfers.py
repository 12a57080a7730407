"""System calls that do less than they were asked for, on a real file: the rest follows, or the guest hears of it."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from qcowfuse.buffer import Buffer
from qcowfuse.driver.chain import open_image
from qcowfuse.driver.options import OpenOptions
from qcowfuse.driver.qcow_image import QcowImage
from qcowfuse.storage import blocking, inline_reads
from qcowfuse.storage import file as file_module
from tests.support.checker import check_image_bytes
from tests.support.images import ImageSpec, build_image, write_chain
from tests.support.powercut import read_image, read_whole

KIB = 1 << 10
SPECS = {
    "v3": ImageSpec(size=128 * KIB, fill=0.3),
    "snapshot": ImageSpec(size=128 * KIB, cluster_size=4096, fill=0.8, snapshot=True),
    "zlib": ImageSpec(size=128 * KIB, cluster_size=4096, fill=0.8, compression="zlib"),
    "v1": ImageSpec(version=1, size=128 * KIB),
}


class ShortCalls:
    """Stands in for the system calls of FileStorage: each does a random part, at least one byte. After ``n_writes``
    the disk is full: the last write still does its part, as the kernel has it."""

    def __init__(self, chooser: random.Random, monkeypatch: pytest.MonkeyPatch, n_writes: int = 1 << 30) -> None:
        self.chooser = chooser
        self.n_writes = n_writes
        self.n_short = 0
        for module in (inline_reads, blocking):
            monkeypatch.setattr(module, "sys_pread", self.pread)
            monkeypatch.setattr(module, "sys_preadv", self.preadv)
        for module in (file_module, blocking):
            monkeypatch.setattr(module, "sys_pwrite", self.pwrite)
        monkeypatch.setattr(os, "pwritev", self.pwritev)
        self._real = os.pread, os.preadv, os.pwrite

    def _part(self, n_bytes: int) -> int:
        part = n_bytes if self.chooser.random() < 0.4 else self.chooser.randint(1, max(n_bytes, 1))
        self.n_short += part < n_bytes
        return part

    def pread(self, fd: int, n_bytes: int, offset: int) -> bytes:
        """pread(2)."""
        return self._real[0](fd, self._part(n_bytes), offset)

    def preadv(self, fd: int, buffers: Sequence[Buffer], offset: int, flags: int = 0) -> int:
        """preadv(2)."""
        (buffer,) = buffers
        return self._real[1](fd, (memoryview(buffer)[: self._part(len(buffer))],), offset, flags)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        """pwrite(2)."""
        self.n_writes -= 1
        if self.n_writes < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._real[2](fd, memoryview(data)[: self._part(len(data))], offset)

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """pwritev(2)."""
        return self.pwrite(fd, b"".join(buffers), offset)


async def write(image: QcowImage, offset: int, data: bytes) -> None:
    """As the mount writes."""
    await image.write(offset, data)


@pytest.mark.parametrize("io_uring", [False, True], ids=["threads", "io_uring"])
@pytest.mark.parametrize("spec", SPECS)
async def test_short_reads_and_writes_are_completed(
    spec: str, io_uring: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody notices: contents and image are as with full transfers."""
    built = build_image(SPECS[spec])
    path = write_chain(str(tmp_path), built.files)
    chooser = random.Random(spec)
    short = ShortCalls(chooser, monkeypatch)
    image = await open_image(path, OpenOptions(io_uring=io_uring))
    oracle = bytearray(built.contents)
    for number in range(60):
        n_bytes = chooser.randint(1, 12 * KIB)
        offset = chooser.randrange(image.size - n_bytes)
        if number % 5 == 4:
            await image.write_zeroes(offset, n_bytes, unmap=number % 2 == 0)
            oracle[offset : offset + n_bytes] = bytes(n_bytes)
        else:
            data = chooser.randbytes(n_bytes)
            await write(image, offset, data)
            oracle[offset : offset + n_bytes] = data
        if number % 10 == 9:
            await image.flush()
        assert await read_image(image, offset, n_bytes) == oracle[offset : offset + n_bytes]
    assert await read_whole(image) == oracle
    await image.aclose()
    assert short.n_short > 100
    assert check_image_bytes(Path(path).read_bytes()).exit_code == 0


@pytest.mark.parametrize("spec", SPECS)
async def test_a_short_write_before_a_full_disk(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the rest of a short write fails, for each write in turn: ENOSPC, and all that was fsynced is there."""
    built = build_image(SPECS[spec])
    for number in range(0, 60, 3):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = write_chain(str(folder), built.files)
        oracle = bytearray(built.contents)
        chooser = random.Random(number)
        heard = 0
        with monkeypatch.context() as patch:
            short = ShortCalls(chooser, patch, number)
            image = await open_image(path)
            for _ in range(12):
                sector = chooser.randrange(image.size // 512 - 20)
                data = chooser.randbytes(chooser.randint(1, 20) * 512)
                try:
                    await write(image, sector * 512, data)
                    await image.flush()
                except OSError as error:
                    heard = error.errno or -1
                    break
                oracle[sector * 512 : sector * 512 + len(data)] = data
            assert heard in (0, errno.ENOSPC)
            report = check_image_bytes(Path(path).read_bytes())
            assert not report.errors, report.errors[:3]
            short.n_writes = 1 << 30  # somebody makes room
            found = await read_whole(image)
            for other in range(0, image.size, 512):
                in_doubt = heard and sector * 512 <= other < sector * 512 + len(data)
                assert in_doubt or found[other : other + 512] == oracle[other : other + 512]
            await image.aclose()
        assert check_image_bytes(Path(path).read_bytes()).leaks <= 2
        if not heard:
            return
    assert heard
