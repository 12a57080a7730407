"""Rows of file systems and databases on a loop device over the served file."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from .contenders import Served
from .row import NotDoneError, Row, Settings
from .tools import run


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


def _archive(served: Served, settings: Settings) -> float:
    """Read the tree that was unpacked, with nothing of it in memory, into a tar archive."""
    archive = _tree_archive(settings)
    with _mounted_on_loop(served.file, settings.folder, direct=True) as tree:
        run("tar", "-C", str(tree), "-xf", str(archive))
        device = run("findmnt", "-n", "-o", "SOURCE", str(tree)).strip()
        run("umount", str(tree))
        run("mount", device, str(tree))
        start = time.monotonic()
        # To /dev/null itself tar writes nothing, and reads nothing for it.
        run("sh", "-c", f"tar -C '{tree}' -cf - tree | cat >/dev/null")
        return time.monotonic() - start


@contextmanager
def _loop(file: Path) -> Iterator[str]:
    loop = run("losetup", "-f", "--show", "--direct-io=on", str(file)).strip()
    try:
        yield loop
    finally:
        run("losetup", "-d", loop, check=False)


def _make(served: Served, settings: Settings, *, command: tuple[str, ...]) -> float:
    """Time a command on a loop device, and what it takes until its writes are durable."""
    with _loop(served.file) as loop:
        start = time.monotonic()
        run(*command, loop)
        run("sync", loop)
        return time.monotonic() - start


def _check(served: Served, settings: Settings) -> float:
    archive = _tree_archive(settings)
    with _mounted_on_loop(served.file, settings.folder, direct=True) as tree:
        run("tar", "-C", str(tree), "-xf", str(archive))
        device = run("findmnt", "-n", "-o", "SOURCE", str(tree)).strip()
        run("umount", str(tree))
        start = time.monotonic()
        run("e2fsck", "-f", "-n", device)
        return time.monotonic() - start


def _trim(served: Served, settings: Settings) -> float:
    """fstrim after a tree was removed. Raises NotDoneError where its space is not given back: a file that refuses one
    discard, of a part of a cluster, gets no more of them, and fstrim says nothing."""
    archive = _tree_archive(settings)
    with _mounted_on_loop(served.file, settings.folder, direct=True) as tree:
        run("tar", "-C", str(tree), "-xf", str(archive))
        run("sync", "-f", str(tree))
        shutil.rmtree(tree / "tree")
        run("sync", "-f", str(tree))
        n_before = served.file.stat().st_blocks
        start = time.monotonic()
        run("fstrim", str(tree))
        seconds = time.monotonic() - start
        run("sync", "-f", str(tree))
        if n_before - served.file.stat().st_blocks < archive.stat().st_size // 2 // 512:
            raise NotDoneError("fstrim gives back no space")
        return seconds


def _discard(served: Served, settings: Settings) -> float:
    """blkdiscard of the whole device, of which a quarter holds data."""
    with _loop(served.file) as loop:
        run("dd", "if=/dev/urandom", f"of={loop}", "bs=4M", "count=256", "oflag=direct")
        start = time.monotonic()
        run("blkdiscard", "-f", loop)
        run("sync", loop)
        return time.monotonic() - start


def _sqlite(served: Served, settings: Settings) -> float:
    """Transactions that insert one line each, all of them durable."""
    n_transactions = 200 if settings.quick else 1000
    with _mounted_on_loop(served.file, settings.folder, direct=True) as tree:
        with closing(sqlite3.connect(tree / "database", isolation_level=None)) as database:
            database.execute("pragma synchronous = full")
            database.execute("create table lines (number integer primary key, text text)")
            start = time.monotonic()
            for number in range(n_transactions):
                database.execute("begin immediate")
                database.execute("insert into lines values (?, ?)", (number, "x" * 100))
                database.execute("commit")
            return n_transactions / (time.monotonic() - start)


def _postgresql(served: Served, settings: Settings) -> float:
    """Transactions a second of pgbench, with two clients."""
    programs = _postgresql_programs()
    assert programs is not None
    seconds = 3 if settings.quick else 10
    reachable = Path("/var/tmp")  # for another user too
    with _mounted_on_loop(served.file, reachable, direct=True) as tree:
        data = tree / "data"
        data.mkdir()
        shutil.chown(data, "postgres")
        socket = Path(tempfile.mkdtemp(prefix="qcowfuse-pg-"))
        shutil.chown(socket, "postgres")

        def as_postgres(*command: str) -> str:
            return run("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *command, cwd=Path("/"))

        as_postgres(str(programs / "initdb"), "-D", str(data), "-A", "trust")
        server = [str(programs / "postgres"), "-D", str(data), "-k", str(socket), "-h", ""]
        process = subprocess.Popen(
            ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *server],
            cwd="/",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            end = time.monotonic() + 30
            while subprocess.run([programs / "pg_isready", "-q", "-h", socket]).returncode:
                if time.monotonic() > end:
                    raise SystemExit("bench: PostgreSQL does not start")
                time.sleep(0.05)
            as_postgres(str(programs / "pgbench"), "-q", "-i", "-s", "5", "-h", str(socket), "postgres")
            output = as_postgres(
                *(str(programs / "pgbench"), "-c", "2", "-T", str(seconds), "-h", str(socket), "postgres")
            )
            return next(float(line.split()[2]) for line in output.splitlines() if line.startswith("tps = "))
        finally:
            process.terminate()
            process.wait()
            shutil.rmtree(socket)


def _postgresql_programs() -> Path | None:
    """Where Debian has the newest server's programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


def _row(name: str, unit: str, measure: Callable[[Served, Settings], float], *needs: str) -> Row:
    tools = ("losetup", "mkfs.ext4", *needs)
    return Row(name, "loop", unit, measure, writes=True, is_fresh=True, needs=tools, needs_root=True)


def _rows() -> Iterator[Row]:
    for name, direct in (("buffered", False), ("direct-io", True)):
        unpack, bonnie = partial(_unpack, direct=direct), partial(_bonnie, direct=direct)
        yield _row(f"ext4 on a loop device ({name}): unpack a tree", "s", unpack)
        yield _row(f"ext4 on a loop device ({name}): bonnie++", "s", bonnie, "bonnie++")
    yield _row("ext4 on a loop device (direct-io): tar of a tree, cold", "s", _archive)
    yield _row("ext4 on a loop device (direct-io): e2fsck -f", "s", _check, "e2fsck")
    yield _row("ext4 on a loop device (direct-io): fstrim", "s", _trim, "fstrim")
    yield _row("loop device (direct-io): blkdiscard", "s", _discard, "blkdiscard")
    for kind, options in (("ext4", ("-q",)), ("xfs", ("-q", "-f")), ("btrfs", ("-q", "-f"))):
        make = partial(_make, command=(f"mkfs.{kind}", *options))
        yield _row(f"loop device (direct-io): mkfs.{kind}", "s", make, f"mkfs.{kind}")
    yield _row("ext4 on a loop device (direct-io): SQLite, durable transactions", "per s", _sqlite)
    yield _row("ext4 on a loop device (direct-io): PostgreSQL, pgbench", "per s", _postgresql, "pgbench", "setpriv")


LOOP_ROWS = tuple(row for row in _rows() if "PostgreSQL" not in row.name or _postgresql_programs() is not None)
