"""What is measured: each row is one figure of one served disk, on one kind of image."""

from __future__ import annotations

import os
import random
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from . import images
from .contenders import Served
from .tools import fio, run


@dataclass(frozen=True)
class Settings:
    """How much is measured. ``folder`` is for helper files."""

    folder: Path
    size_mib: int
    compressed_mib: int
    seconds: float
    quick: bool


Measure = Callable[[Served, Settings], float]


@dataclass(frozen=True)
class Row:
    """``is_fresh``: each measurement has its own copy of the image and its own daemon. ``unit`` names the figure;
    of seconds and MiB of memory less is better."""

    name: str
    scene: str
    unit: str
    measure: Measure
    writes: bool = False
    is_fresh: bool = False
    needs: tuple[str, ...] = ()
    needs_root: bool = False

    @property
    def less_is_better(self) -> bool:
        """Whether the smaller figure is the better one."""
        return self.unit in ("s", "MiB")


MAKERS: dict[str, images.Maker] = {
    "full": images.full,
    "zlib": images.zlib,
    "zstd": images.zstd,
    "chain": images.chain,
    "empty": images.empty,
    "sparse": images.sparse_16_tib,
    "start": images.full,
    "loop": images.empty,
}


def image_mib(scene: str, settings: Settings) -> int:
    """Size of the images of a scene."""
    if scene == "loop":
        return 4096
    return settings.compressed_mib if scene in ("zlib", "zstd", "chain") else settings.size_mib


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
        amount = {"seconds": settings.seconds}
        extra = options
        if n_mib:
            amount = {}
            extra = (*options, f"--size={min(n_mib, settings.size_mib)}M")
        elif n_ops:
            amount = {"n_ops": n_ops // share}
        result = fio(served.file, mode, block, depth=depth, direct=direct, options=extra, **amount)
        return result["iops"] if figure == "iops" else result["bytes_per_second"] / images.MIB

    return measure


_stream = partial(_job, figure="MiB/s")


def _start_seconds(served: Served, settings: Settings) -> float:
    raise AssertionError("measured by whoever starts the daemon")


def _resident(served: Served, settings: Settings) -> float:
    fio(served.file, "randread", "4k", depth=16, n_ops=5000 if settings.quick else 20000)
    return served.resident_mib()


@contextmanager
def _mounted_on_loop(file: Path, folder: Path, *, direct: bool) -> Iterator[Path]:
    """A new ext4 on a loop device over ``file``."""
    loop = run("losetup", "-f", "--show", f"--direct-io={'on' if direct else 'off'}", str(file)).strip()
    tree = Path(tempfile.mkdtemp(dir=folder, prefix="ext4"))
    try:
        run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", loop)
        run("mount", loop, str(tree))
        try:
            yield tree
        finally:
            run("umount", str(tree), check=False)
    finally:
        run("losetup", "-d", loop, check=False)
        tree.rmdir()


def _tree_archive(settings: Settings) -> Path:
    """A tar archive of many small and some larger files, made once."""
    archive = settings.folder / "tree.tar"
    if archive.exists():
        return archive
    generator = random.Random(1)
    n_files = 1000 if settings.quick else 4000
    source = Path(tempfile.mkdtemp(dir=settings.folder))
    for number in range(n_files):
        path = source / f"d{number % 97}" / f"f{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(generator.randbytes(generator.choice((300, 2000, 9000, 30000, 200000))))
    with tarfile.open(archive, "w") as tar:
        tar.add(source, arcname="tree")
    shutil.rmtree(source)
    return archive


def _unpack(served: Served, settings: Settings, *, direct: bool) -> float:
    archive = _tree_archive(settings)
    with _mounted_on_loop(served.file, settings.folder, direct=direct) as tree:
        start = time.monotonic()
        run("tar", "-C", str(tree), "-xf", str(archive))
        run("sync", "-f", str(tree))
        return time.monotonic() - start


def _bonnie(served: Served, settings: Settings, *, direct: bool) -> float:
    size = 128 if settings.quick else 512
    with _mounted_on_loop(served.file, settings.folder, direct=direct) as tree:
        start = time.monotonic()
        user = ("-u", "root") if os.geteuid() == 0 else ()
        run(
            *("bonnie++", "-q", *user, "-d", str(tree), "-s", f"{size}M"),
            *("-r", str(size // 2), "-n", "8:65536:1024:4", "-m", "q"),
        )
        return time.monotonic() - start


def _loop_rows() -> Iterator[Row]:
    tools = ("losetup", "mkfs.ext4")
    for name, direct in (("buffered", False), ("direct-io", True)):
        common = {"writes": True, "is_fresh": True, "needs_root": True}
        yield Row(
            f"ext4 on a loop device ({name}): unpack a tree",
            "loop",
            "s",
            partial(_unpack, direct=direct),
            needs=tools,
            **common,  # type: ignore[arg-type]
        )
        yield Row(
            f"ext4 on a loop device ({name}): bonnie++",
            "loop",
            "s",
            partial(_bonnie, direct=direct),
            needs=(*tools, "bonnie++"),
            **common,  # type: ignore[arg-type]
        )


_END = ("--end_fsync=1",)

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
    Row("16 TiB, sparse: 4 KiB random read, direct", "sparse", "IOPS", _job("randread", "4k")),
    Row("16 TiB, sparse: 4 KiB random read, direct, depth 16", "sparse", "IOPS", _job("randread", "4k", 16)),
    Row("16 TiB, sparse: start-up", "sparse", "s", _start_seconds, is_fresh=True),
    Row("start-up", "start", "s", _start_seconds, is_fresh=True),
    Row("resident memory after random reads", "start", "MiB", _resident, is_fresh=True),
    *_loop_rows(),
)


def is_start_up(row: Row) -> bool:
    """Whether what counts is the time until the daemon serves."""
    return row.measure is _start_seconds
