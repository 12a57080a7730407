"""Streams of compressed clusters that are unusual or damaged: what QEMU reads of them is read, and nothing else."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from qcowfuse.driver.chain import open_image
from qcowfuse.driver.options import OpenOptions
from qcowfuse.errors import FormatError
from qcowfuse.format.compression import decompress_clusters
from tests.support import battery, qemu

CLUSTER = 4096
N_CLUSTERS = 64
COPIED, COMPRESSED = 1 << 63, 1 << 62
OFFSET = (1 << 56) - 512


def text(n_bytes: int = CLUSTER) -> bytes:
    """Bytes that compress to about a half."""
    chooser = random.Random(7)
    return bytes(chooser.choice(b"0123456789abcdef \n") for _ in range(n_bytes))


def zstd(data: bytes, *, checksum: bool = False, size: bool = True, magic: bool = True) -> bytes:
    """One frame."""
    kind = zstandard.FORMAT_ZSTD1 if magic else zstandard.FORMAT_ZSTD1_MAGICLESS
    parameters = zstandard.ZstdCompressionParameters(
        compression_level=3, write_checksum=checksum, write_content_size=size, format=kind
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


def skippable(n_bytes: int) -> bytes:
    """A frame with ``n_bytes`` for somebody else."""
    return struct.pack("<II", 0x184D2A53, n_bytes) + b"s" * n_bytes


WHOLE = text()
FRAMES: dict[str, Callable[[], bytes]] = {
    "plain": lambda: zstd(WHOLE),
    "garbage behind": lambda: zstd(WHOLE) + b"\xff" * 77,
    "garbage behind, no size": lambda: zstd(WHOLE, size=False) + b"\xff" * 77,
    "no size": lambda: zstd(WHOLE, size=False),
    "checksum": lambda: zstd(WHOLE, checksum=True),
    "checksum, no size": lambda: zstd(WHOLE, checksum=True, size=False),
    "checksum damaged": lambda: zstd(WHOLE, checksum=True)[:-1] + b"\x5a",
    "checksum damaged, no size": lambda: zstd(WHOLE, checksum=True, size=False)[:-1] + b"\x5a",
    "longer": lambda: zstd(text(CLUSTER + 100)),
    "longer, no size": lambda: zstd(text(CLUSTER + 100), size=False),
    "shorter": lambda: zstd(text(CLUSTER - 1)),
    "shorter, no size": lambda: zstd(text(CLUSTER - 1), size=False),
    "two frames": lambda: zstd(WHOLE[:1000]) + zstd(WHOLE[1000:]),
    "two frames, no size": lambda: zstd(WHOLE[:1000], size=False) + zstd(WHOLE[1000:], size=False, checksum=True),
    "second too long": lambda: zstd(WHOLE[:1000]) + zstd(WHOLE),
    "whole, then another": lambda: zstd(WHOLE) + zstd(b"another"),
    "whole, then another, no size": lambda: zstd(WHOLE, size=False) + zstd(b"another"),
    "whole, then a damaged one": lambda: zstd(WHOLE, size=False) + zstd(b"another")[:4] + b"\xff" * 9,
    "empty frames": lambda: zstd(b"") + zstd(b"", size=False) + zstd(WHOLE) + zstd(b""),
    "skippable first": lambda: skippable(10) + zstd(WHOLE),
    "large skippable first": lambda: skippable(CLUSTER - 1500) + zstd(WHOLE[:100]) + zstd(WHOLE[100:]),
    "skippable of a cluster": lambda: skippable(CLUSTER)[:300] + zstd(WHOLE),
    "skippable between": lambda: zstd(WHOLE[:9]) + skippable(3) + zstd(WHOLE[9:]),
    "no magic": lambda: zstd(WHOLE, magic=False),
    "nothing": lambda: b"",
    "cut": lambda: zstd(WHOLE)[:-200],
    "cut, no size": lambda: zstd(WHOLE, size=False)[:-3],
    "zlib": lambda: zlib.compress(WHOLE),
    "zeroes": lambda: zstd(bytes(CLUSTER), size=False),
    "bomb": lambda: zstd(bytes(64 << 20), size=False),
}


def make_image(path: Path, payloads: list[bytes], compression: str) -> None:
    """Guest cluster 2 i is compressed, with ``payloads[i]`` in its host cluster; the others are data."""
    options = f"cluster_size={CLUSTER},compression_type={compression}"
    qemu.create(path, "qcow2", 2 * len(payloads) * CLUSTER, options=options)
    qemu.io(path, [f"write -P 1 0 {2 * len(payloads) * CLUSTER}"])
    data = bytearray(path.read_bytes())
    (l1,) = struct.unpack_from(">Q", data, 40)
    for number, payload in enumerate(payloads):
        table = (
            struct.unpack_from(">Q", data, l1 + 8 * (2 * number * CLUSTER // (CLUSTER * CLUSTER // 8)))[0] & OFFSET
        )
        position = table + 8 * (2 * number % (CLUSTER // 8))
        place = struct.unpack_from(">Q", data, position)[0] & OFFSET
        payload = payload[:CLUSTER]
        n_more = max(len(payload) - 1, 0) // 512
        data[place : place + CLUSTER] = payload.ljust(CLUSTER, b"\0")
        struct.pack_into(">Q", data, position, COMPRESSED | n_more << 62 - (12 - 8) | place)
    path.write_bytes(data)


async def compare(path: Path, n_payloads: int) -> int:
    """Each compressed cluster is read, alone, from its middle and with a neighbour, or refused, as by QEMU. How many
    could be read."""
    opened = await open_image(str(path), OpenOptions(read_only=True))
    raw = path.with_name("out.raw")
    n_read = 0
    for number in range(n_payloads):
        start = 2 * number * CLUSTER
        done = qemu.run("qemu-io", "-r", "-f", "qcow2", "-c", f"read {start} {CLUSTER}", path)
        readable = "read 4096/4096 bytes" in done.stdout
        assert readable or "read failed: Input/output error" in done.stdout, done
        n_read += readable
        if not readable:
            for first, n_bytes in ((start, CLUSTER), (start, 2 * CLUSTER)):
                with pytest.raises(FormatError):
                    await battery.read(opened, first, n_bytes)
            continue
        command = f"dd if={path} of={raw} bs={CLUSTER} skip={2 * number} count={2 * number + 1}".split()
        qemu.must_run("qemu-img", command[0], "-f", "qcow2", "-O", "raw", *command[1:])
        expected = raw.read_bytes()
        assert await battery.read(opened, start, CLUSTER) == expected, number
        assert await battery.read(opened, start + 1000, 100) == expected[1000:1100], number
        assert await battery.read(opened, start, 2 * CLUSTER) == expected + b"\1" * CLUSTER, number
    await opened.aclose()
    return n_read


@pytest.mark.parametrize("start", range(0, len(FRAMES), 10))
async def test_zstd_streams(start: int, image_folder: Path) -> None:
    """Frames of every kind."""
    payloads = [make() for make in list(FRAMES.values())[start : start + 10]]
    path = image_folder / "image.qcow2"
    make_image(path, payloads, "zstd")
    assert 0 < await compare(path, len(payloads)) < 10


@pytest.mark.parametrize("name", FRAMES)
def test_several_at_once(name: str) -> None:
    """Among others that are sound, a stream gives what it gives alone."""
    packed = [part.ljust(CLUSTER, b"\0")[:CLUSTER] for part in (zstd(WHOLE), FRAMES[name](), zstd(WHOLE))]
    (alone,) = decompress_clusters(packed[1:2], 1, CLUSTER)
    first, among, last = decompress_clusters(
        [memoryview(b"".join(packed))[at * CLUSTER :][:CLUSTER] for at in range(3)], 1, CLUSTER
    )
    assert bytes(first) == bytes(last) == WHOLE  # type: ignore[arg-type]
    assert repr(among) == repr(alone) if isinstance(alone, FormatError) else among == alone


async def test_damaged_deflate_streams(image_folder: Path) -> None:
    """Streams in which single bytes were changed, most of them where the cluster is nearly full."""
    chooser = random.Random(5)
    packer = zlib.compressobj(6, zlib.DEFLATED, -12)
    packed = packer.compress(WHOLE) + packer.flush()
    payloads = []
    for number in range(40):
        damaged = bytearray(packed + bytes(6))
        start = len(packed) - 8 if number % 4 else 0
        damaged[chooser.randrange(start, len(damaged))] = chooser.randrange(256)
        payloads.append(bytes(damaged))
    path = image_folder / "image.qcow2"
    make_image(path, payloads, "zlib")
    assert 0 < await compare(path, len(payloads)) < len(payloads)


def test_what_only_zlib_takes() -> None:
    """Short clusters packed with fixed codes, damaged behind their last byte: ISA-L refuses some of these."""
    isal_zlib = pytest.importorskip("isal.isal_zlib", reason="there is no ISA-L for this processor")
    chooser = random.Random(1)
    whole = (b"0123456789abcdef" * 32)[:512]
    packer = zlib.compressobj(6, zlib.DEFLATED, -12)
    packed = packer.compress(whole) + packer.flush() + bytes(8)
    n_taken = n_refused = 0
    for _ in range(2000):
        damaged = bytearray(packed)
        damaged[chooser.randrange(len(damaged))] = chooser.randrange(256)
        try:
            expected = zlib.decompressobj(-12).decompress(damaged, 512)
        except zlib.error:
            continue
        if len(expected) < 512:
            continue
        n_taken += 1
        assert decompress_clusters([damaged, damaged], 0, 512) == [expected] * 2
        try:
            n_refused += len(isal_zlib.decompressobj(-15).decompress(damaged, 512)) < 512
        except Exception:
            n_refused += 1
    assert n_taken > 100
    assert n_refused, "nothing here needs zlib"
