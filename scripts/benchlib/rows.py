"""What is measured: fio jobs here, and the rows of whole commands, file systems and databases.

A row that reads through the kernel's page cache says "buffered". fio throws the cache of the file away before such a
job, which then reads to the end of the file: nothing of it is in memory when the job begins.
"""

from __future__ import annotations

from functools import partial

from . import images
from .command_rows import COMMAND_ROWS
from .contenders import Served
from .loop_rows import LOOP_ROWS
from .row import Measure, Row, Settings
from .tools import fio

DEVICE = "device"
"""The scene whose image lies on a block device."""

MAKERS: dict[str, images.Maker] = {
    "full": images.full,
    "zlib": images.zlib,
    "zstd": images.zstd,
    "chain": images.chain,
    "empty": images.empty,
    "sparse": images.sparse_16_tib,
    "start": images.full,
    DEVICE: images.full,
    "loop": images.empty,
    "luks": images.luks,
    "luks-empty": images.luks_empty,
    "extended": images.extended,
    "small": images.clusters_of_4_kib,
    "copy": images.full,
    "copy-half": images.half,
    "copy-empty": images.empty,
}


_SMALLER = frozenset({"zlib", "zstd", "chain", "luks", "luks-empty", "extended", "small"})


def image_mib(scene: str, settings: Settings) -> int:
    """Size of the images of a scene."""
    if scene == "loop":
        return 4096
    return settings.compressed_mib if scene in _SMALLER else settings.size_mib


def _job(
    mode: str,
    block: str,
    depth: int = 1,
    *,
    figure: str = "iops",
    direct: bool = True,
    n_mib: int = 0,
    n_ops: int = 0,
    options: tuple[str, ...] = (),
) -> Measure:
    """A fio job: for a time, or one pass over ``n_mib``, or ``n_ops`` (an eighth with --quick)."""

    def measure(served: Served, settings: Settings) -> float:
        share = 8 if settings.quick else 1
        seconds, count = settings.seconds, 0
        extra = options
        if n_mib:
            seconds = 0.0
            extra = (*options, f"--size={min(n_mib, served.file.stat().st_size >> 20)}M")
        elif n_ops:
            seconds, count = 0.0, n_ops // share
        result = fio(
            served.file, mode, block, depth=depth, direct=direct, seconds=seconds, n_ops=count, options=extra
        )
        return result["iops"] if figure == "iops" else result["bytes_per_second"] / images.MIB

    return measure


_stream = partial(_job, figure="MiB/s")


def _start_seconds(served: Served, settings: Settings) -> float:
    raise AssertionError("measured by whoever starts the daemon")


def _resident(served: Served, settings: Settings) -> float:
    fio(served.file, "randread", "4k", depth=16, n_ops=5000 if settings.quick else 20000)
    return served.resident_mib()


_END = ("--end_fsync=1",)


def _luks_rows() -> tuple[Row, ...]:
    luks = partial(Row, scene="luks")
    return (
        luks("LUKS: 1 MiB sequential read, direct, depth 4", unit="MiB/s", measure=_stream("read", "1M", 4)),
        luks(
            "LUKS: 1 MiB sequential write, direct, depth 4",
            unit="MiB/s",
            measure=_stream("write", "1M", 4),
            writes=True,
        ),
        luks("LUKS: 4 KiB random read, direct, depth 1", unit="IOPS", measure=_job("randread", "4k")),
        luks("LUKS: 4 KiB random read, direct, depth 16", unit="IOPS", measure=_job("randread", "4k", 16)),
        luks("LUKS: 4 KiB random write, direct, depth 1", unit="IOPS", measure=_job("randwrite", "4k"), writes=True),
        luks(
            "LUKS: 4 KiB random write, direct, depth 16",
            unit="IOPS",
            measure=_job("randwrite", "4k", 16),
            writes=True,
        ),
        luks(
            "LUKS: 128 KiB sequential read, buffered",
            unit="MiB/s",
            measure=_stream("read", "128k", direct=False, n_mib=256),
        ),
        luks(
            "LUKS: 1 MiB sequential write, buffered",
            unit="MiB/s",
            measure=_stream("write", "1M", direct=False, n_mib=256, options=_END),
            writes=True,
        ),
        Row(
            "LUKS, allocating: 1 MiB sequential write, direct, depth 4",
            "luks-empty",
            "MiB/s",
            _stream("write", "1M", 4, n_mib=256, options=_END),
            writes=True,
            is_fresh=True,
        ),
    )


def _device_rows() -> tuple[Row, ...]:
    device = partial(Row, scene=DEVICE, needs=("losetup",), needs_root=True)
    write = partial(device, writes=True)
    return (
        device(
            "image on a block device: 4 KiB random read, direct, depth 1", unit="IOPS", measure=_job("randread", "4k")
        ),
        write(
            "image on a block device: 4 KiB random write, direct, depth 1",
            unit="IOPS",
            measure=_job("randwrite", "4k"),
        ),
        write(
            "image on a block device: 4 KiB random write, direct, depth 16",
            unit="IOPS",
            measure=_job("randwrite", "4k", 16),
        ),
        write(
            "image on a block device: 64 KiB random write, direct, depth 4",
            unit="IOPS",
            measure=_job("randwrite", "64k", 4),
        ),
    )


ROWS: tuple[Row, ...] = (
    Row("4 KiB random read, direct, depth 1", "full", "IOPS", _job("randread", "4k")),
    Row("4 KiB random read, direct, depth 16", "full", "IOPS", _job("randread", "4k", 16)),
    Row("4 KiB random write, direct, depth 1", "full", "IOPS", _job("randwrite", "4k"), writes=True),
    Row("4 KiB random write, direct, depth 16", "full", "IOPS", _job("randwrite", "4k", 16), writes=True),
    Row(
        "4 KiB random 70 % read, 30 % write, direct, depth 16",
        "full",
        "IOPS",
        _job("randrw", "4k", 16, options=("--rwmixread=70",)),
        writes=True,
    ),
    Row("1 MiB sequential read, direct, depth 1", "full", "MiB/s", _stream("read", "1M")),
    Row("1 MiB sequential read, direct, depth 4", "full", "MiB/s", _stream("read", "1M", 4)),
    Row("1 MiB sequential write, direct, depth 1", "full", "MiB/s", _stream("write", "1M"), writes=True),
    Row("1 MiB sequential write, direct, depth 4", "full", "MiB/s", _stream("write", "1M", 4), writes=True),
    Row("128 KiB sequential read, buffered", "full", "MiB/s", _stream("read", "128k", direct=False, n_mib=1024)),
    Row("4 KiB random read, buffered", "full", "IOPS", _job("randread", "4k", direct=False)),
    Row(
        "4 KiB random write, buffered, fsync every 32",
        "full",
        "IOPS",
        _job("randwrite", "4k", direct=False, options=("--fsync=32",)),
        writes=True,
    ),
    Row(
        "4 KiB random write, buffered, fsync at the end",
        "full",
        "IOPS",
        _job("randwrite", "4k", direct=False, n_ops=100_000, options=_END),
        writes=True,
    ),
    Row(
        "allocating: 1 MiB sequential write, direct, depth 4",
        "empty",
        "MiB/s",
        _stream("write", "1M", 4, n_mib=1024, options=_END),
        writes=True,
        is_fresh=True,
    ),
    Row(
        "allocating: 64 KiB sequential write, direct, depth 1",
        "empty",
        "MiB/s",
        _stream("write", "64k", n_mib=512, options=_END),
        writes=True,
        is_fresh=True,
    ),
    Row(
        "allocating: 4 KiB random write, direct, depth 16",
        "empty",
        "IOPS",
        _job("randwrite", "4k", 16, n_ops=16_000, options=_END),
        writes=True,
        is_fresh=True,
    ),
    Row(
        "allocating: 1 MiB sequential write, buffered",
        "empty",
        "MiB/s",
        _stream("write", "1M", direct=False, n_mib=512, options=_END),
        writes=True,
        is_fresh=True,
    ),
    Row("zlib: 1 MiB sequential read, direct", "zlib", "MiB/s", _stream("read", "1M")),
    Row("zlib: 4 KiB random read, direct", "zlib", "IOPS", _job("randread", "4k")),
    Row("zlib: 4 KiB random read, direct, depth 16", "zlib", "IOPS", _job("randread", "4k", 16)),
    Row("zstd: 1 MiB sequential read, direct", "zstd", "MiB/s", _stream("read", "1M")),
    Row("zstd: 4 KiB random read, direct", "zstd", "IOPS", _job("randread", "4k")),
    Row("zstd: 4 KiB random read, direct, depth 16", "zstd", "IOPS", _job("randread", "4k", 16)),
    Row("chain of three: 4 KiB random read, direct", "chain", "IOPS", _job("randread", "4k")),
    Row("chain of three: 4 KiB random read, direct, depth 16", "chain", "IOPS", _job("randread", "4k", 16)),
    Row("chain of three: 1 MiB sequential read, direct", "chain", "MiB/s", _stream("read", "1M")),
    *_luks_rows(),
    *_device_rows(),
    Row(
        "4 KiB random write, direct, fsync each",
        "full",
        "IOPS",
        _job("randwrite", "4k", options=("--fsync=1",)),
        writes=True,
    ),
    Row(
        "allocating: 4 KiB random write, direct, fsync each",
        "empty",
        "IOPS",
        _job("randwrite", "4k", n_ops=4_000, options=("--fsync=1",)),
        writes=True,
        is_fresh=True,
    ),
    Row(
        "extended entries, allocating: 4 KiB random write, direct, depth 16",
        "extended",
        "IOPS",
        _job("randwrite", "4k", 16, n_ops=16_000, options=_END),
        writes=True,
        is_fresh=True,
    ),
    Row(
        "clusters of 4 KiB, allocating: 1 MiB sequential write, direct, depth 4",
        "small",
        "MiB/s",
        _stream("write", "1M", 4, n_mib=256, options=_END),
        writes=True,
        is_fresh=True,
    ),
    Row("16 TiB, sparse: 4 KiB random read, direct", "sparse", "IOPS", _job("randread", "4k")),
    Row("16 TiB, sparse: 4 KiB random read, direct, depth 16", "sparse", "IOPS", _job("randread", "4k", 16)),
    Row("16 TiB, sparse: start-up", "sparse", "s", _start_seconds, is_fresh=True),
    Row("start-up", "start", "s", _start_seconds, is_fresh=True),
    Row("resident memory after random reads", "start", "MiB", _resident, is_fresh=True),
    *COMMAND_ROWS,
    *LOOP_ROWS,
)


def is_start_up(row: Row) -> bool:
    """Whether what counts is the time until the daemon serves."""
    return row.measure is _start_seconds
