"""A raw data file is the disk as it stands: what lies behind its old end, and what a failed write has left in it."""

from __future__ import annotations

import errno

import pytest

from tests.support.checker import check_image_bytes
from tests.support.faults import FaultyStorage, Operation
from tests.support.images import DATA, TOP, ImageSpec, build_image, open_memory_image, qemu_check
from tests.support.memory_storage import MemoryStorage

KIB = 1 << 10
CLUSTER = 4096


@pytest.mark.parametrize("kind", ["raw", "plain"])
async def test_a_disk_that_grows_over_what_the_data_file_holds(kind: str) -> None:
    """In a raw data file the disk goes on with what is there, over several L2 tables and to an odd end; in another
    one nothing of it shows."""
    spec = ImageSpec(size=64 * KIB, cluster_size=512, fill=0.5, data_file="raw" if kind == "raw" else "plain")
    built = build_image(spec)
    behind = b"behind the end" * 6000
    end_of_data = max(len(built.files[DATA]), 64 * KIB) if kind == "plain" else 64 * KIB
    data = MemoryStorage(built.files[DATA][:end_of_data].ljust(end_of_data, b"\0") + behind)
    top = MemoryStorage(built.top)
    image = await open_memory_image({**built.files, TOP: top, DATA: data})
    await image.grow(150 * KIB)
    shown = bytes(await image.read(64 * KIB, 86 * KIB))
    assert shown == (behind.ljust(86 * KIB, b"\0") if kind == "raw" else bytes(86 * KIB))
    assert bytes(await image.read(0, 64 * KIB)) == built.contents
    await image.aclose()
    files = {**built.files, TOP: bytes(top.data), DATA: bytes(data.data)}
    assert check_image_bytes(files[TOP]).exit_code == 0
    assert qemu_check(files)[0] == 0
    again = await open_memory_image(files, read_only=True)
    assert bytes(await again.read(64 * KIB, 86 * KIB)) == shown
    await again.aclose()


@pytest.mark.parametrize("kind", ["raw", "plain"])
async def test_what_a_failed_write_leaves(kind: str) -> None:
    """The part that arrived shows in a raw data file, for whoever reads that file sees it too; in another one the
    cluster stays unlinked and reads as before."""
    spec = ImageSpec(size=64 * KIB, cluster_size=CLUSTER, fill=0.0, data_file="raw" if kind == "raw" else "plain")
    built = build_image(spec)
    data, top = MemoryStorage(built.files[DATA].ljust(64 * KIB, b"\0")), MemoryStorage(built.top)
    fails = False

    def check(operation: Operation) -> int:
        return errno.EIO if fails and operation.kind == "write" else 0

    image = await open_memory_image(
        {**built.files, TOP: top, DATA: data}, wrap_data=lambda inner: FaultyStorage(inner, check=check)
    )
    await image.grow(128 * KIB)  # QEMU links the whole of a new disk with a raw data file, and nothing behind it
    fails = True
    with pytest.raises(OSError, match="Input/output error"):
        await image.write(100 * KIB, b"w" * CLUSTER)
    arrived = bytes(data.data[100 * KIB : 104 * KIB])
    assert arrived.startswith(b"w" * 512), "the double writes a part before it fails"
    assert bytes(await image.read(100 * KIB, CLUSTER)) == (arrived if kind == "raw" else bytes(CLUSTER))
    fails = False
    await image.write(100 * KIB, b"v" * CLUSTER)
    await image.aclose()
    assert check_image_bytes(bytes(top.data)).exit_code == 0
    assert bytes(data.data[100 * KIB : 104 * KIB]) == b"v" * CLUSTER


@pytest.mark.parametrize("unmap", [True, False])
async def test_zeroing_what_is_not_linked(unmap: bool) -> None:
    """A discard punches a raw data file where nothing is linked too; both read as zeroes, and the rest stays."""
    built = build_image(ImageSpec(size=64 * KIB, cluster_size=CLUSTER, fill=1.0, data_file="raw"))
    data, top = MemoryStorage(built.files[DATA][: 64 * KIB]), MemoryStorage(built.top)
    image = await open_memory_image({**built.files, TOP: top, DATA: data})
    await image.grow(128 * KIB)
    data.data[80 * KIB : 84 * KIB] = b"u" * CLUSTER  # written past the image, as a user of the raw file may do
    await image.write_zeroes(60 * KIB, 40 * KIB, unmap=unmap)
    assert bytes(await image.read(0, 128 * KIB)) == built.contents[: 60 * KIB] + bytes(68 * KIB)
    if unmap:
        assert bytes(data.data[60 * KIB : 100 * KIB]) == bytes(40 * KIB)
    await image.aclose()
    assert check_image_bytes(bytes(top.data)).exit_code == 0
