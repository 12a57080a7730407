"""Large reads when others wait: a thread may hand on what lies in one place, and the bytes are the same."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio

from qcowfuse.buffer import Buffer
from qcowfuse.driver.chain import open_image
from qcowfuse.driver.image import LARGE_READ
from qcowfuse.driver.options import OpenOptions
from qcowfuse.driver.pending import PendingRead
from tests.support import qemu

MIB = 1 << 20
SIZE = 6 * MIB
KINDS = {
    "plain": ("qcow2", ""),
    "clusters of 2 MiB": ("qcow2", "cluster_size=2M"),
    "clusters of 512 bytes": ("qcow2", "cluster_size=512"),
    "extended": ("qcow2", "extended_l2=on,cluster_size=128k"),
    "data file": ("qcow2", "data_file=data.raw,data_file_raw=on"),
    "data file, clusters of 2 MiB": ("qcow2", "data_file=data.raw,cluster_size=2M"),
    "version 1": ("qcow", ""),
}
IN_PIECES = ("clusters of 512 bytes",)
"""Of what QEMU lays tables between the data."""


def contents() -> bytes:
    return random.Random(5).randbytes(SIZE)


async def delivered(pending: PendingRead) -> bytes:
    """What a thread hands on."""
    got: list[bytes] = []
    errors: list[Exception | None] = []
    ended = trio.Event()

    def deliver(data: Buffer) -> None:
        got.append(bytes(data))

    def end(error: Exception | None) -> None:
        errors.append(error)
        ended.set()

    assert pending.start_delivery(deliver, end)
    await ended.wait()
    assert errors == [None]
    (data,) = got
    return data


@pytest.mark.parametrize("kind", KINDS)
async def test_a_large_read_is_delivered(tmp_path: Path, kind: str) -> None:
    """In one place: by a thread. In several, half of it a hole: as ever. On the spot when nobody waits."""
    format_name, options = KINDS[kind]
    data = contents()
    (tmp_path / "source.raw").write_bytes(data)
    path = tmp_path / "image"
    more = ["-o", options] if options else []
    qemu.must_run("qemu-img", "create", "-q", "-f", format_name, *more, str(path), str(SIZE + 2 * MIB), cwd=tmp_path)
    qemu.must_run(*("qemu-img", "convert", "-n", "-f", "raw", "-O", format_name, "source.raw", "image"), cwd=tmp_path)
    image = await open_image(str(path), OpenOptions(read_only=True))
    try:
        await image.read(0, SIZE)  # every table is in memory from now on
        for off, n_bytes in ((0, MIB), (2 * MIB + 512, LARGE_READ), (4 * MIB, MIB), (3 * MIB - 100, MIB + 100)):
            on_the_spot = image.start_read(off, n_bytes, lambda: True)
            assert not isinstance(on_the_spot, PendingRead)
            assert bytes(on_the_spot) == data[off : off + n_bytes]
            started = image.start_read(off, n_bytes)
            if kind in IN_PIECES:
                assert not isinstance(started, PendingRead)
                assert bytes(started) == data[off : off + n_bytes]
            else:
                assert isinstance(started, PendingRead)
                assert await delivered(started) == data[off : off + n_bytes]
        end = await image.read(SIZE - LARGE_READ, 2 * LARGE_READ)
        assert bytes(end) == data[-LARGE_READ:] + bytes(LARGE_READ)
        assert image.life.epochs.n_in_flight == 0
    finally:
        await image.aclose()


async def test_a_small_read_is_not_for_a_thread(tmp_path: Path) -> None:
    """However many wait."""
    path = tmp_path / "image"
    qemu.must_run("qemu-img", "create", "-q", "-f", "qcow2", str(path), str(SIZE))
    qemu.must_run("qemu-io", "-c", f"write -P 7 0 {SIZE}", str(path))
    image = await open_image(str(path), OpenOptions(read_only=True))
    try:
        await image.read(0, 1)
        assert image.start_read(4096, LARGE_READ - 1) == b"\7" * (LARGE_READ - 1)
    finally:
        await image.aclose()
