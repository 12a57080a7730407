"""What the L2 cache saves: operations on the image file, and time, with a delay on every access to it."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

from .contenders import serve_qcowfuse
from .tools import fio, need, run, table


def make_image(folder: Path, *, size_mib: int, cluster: str) -> Path:
    """A QCOW2 image in which every cluster is allocated."""
    image = folder / f"full-{size_mib}-{cluster}.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", str(image), f"{size_mib}M")
    step = 64
    for start in range(0, size_mib, step):
        run(
            "qemu-io",
            "-f",
            "qcow2",
            "-c",
            f"write -P {start % 250 + 1} {start}M {min(step, size_mib - start)}M",
            str(image),
        )
    return image


CACHES = {"off": "0", "128 tables": "128t", "default": None}
BACKEND = ("reads", "writes", "flushes")


def measure_cache_row(image: Path, folder: Path, cache: str | None, delay: str, mode: str, n_ops: int) -> list[str]:
    """One workload with one cache size: backend operations per guest operation, and time."""
    options = ["--debug-image-in-memory", "--debug-io-delay", delay]
    if cache is not None:
        options += ["--l2-cache-size", cache]
    with serve_qcowfuse(image, folder, *options) as mounted:
        before = mounted.counters()
        result = fio(mounted.file, mode, "4k", n_ops=n_ops)
        after = mounted.counters()
    per_op = [(after[f"backend.{name}"] - before[f"backend.{name}"]) / result["ops"] for name in BACKEND]
    hits = after["l2_cache.hits"] - before["l2_cache.hits"]
    misses = after["l2_cache.misses"] - before["l2_cache.misses"]
    rate = 100 * hits / max(hits + misses, 1)
    return [f"{result['seconds'] * 1000 / result['ops']:.2f}", *(f"{value:.2f}" for value in per_op), f"{rate:.1f} %"]


def bench_l2_cache(folder: Path, *, quick: bool) -> None:
    """What the L2 cache saves: the image in memory, a delay on every backend access."""
    need("qemu-img", "qemu-io", "fio", "fusermount3")
    size_mib = 256 if quick else 1024
    n_constant_ops = 1000 if quick else 4000
    n_disk_ops = 20 if quick else 40
    image = make_image(folder, size_mib=size_mib, cluster="4k")
    n_tables = size_mib // 2
    print(f"{size_mib} MiB image with 4 KiB clusters ({n_tables} L2 tables of 4 KiB), operations of 4 KiB, depth 1\n")
    for delay, n_ops in (("1ms", n_constant_ops), ("disk", n_disk_ops)):
        rows = []
        for mode in ("randread", "read", "randwrite", "write"):
            for name, cache in CACHES.items():
                figures = measure_cache_row(image, folder, cache, delay, mode, n_ops)
                rows.append([mode, name, *figures])
        print(f"--debug-io-delay {delay}, {n_ops} operations a row\n")
        table(["4 KiB", "L2 cache", "ms/op", "reads/op", "writes/op", "flushes/op", "hit rate"], rows)
        print()
    image.unlink()
    if os.geteuid() or shutil.which("bonnie++") is None:
        print("bonnie++ on ext4 on a loop device: left out (needs root and bonnie++)")
        return
    bench_bonnie(folder, quick=quick)


def bench_bonnie(folder: Path, *, quick: bool) -> None:
    """bonnie++ on ext4 on a loop device over the served file, with each cache size."""
    need("losetup", "mkfs.ext4", "bonnie++")
    rows = []
    size_mib = 128 if quick else 512
    for name, cache in CACHES.items():
        image = folder / "bonnie.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", str(image), "2G")
        options = ["--debug-image-in-memory", "--debug-io-delay", "100us"]
        if cache is not None:
            options += ["--l2-cache-size", cache]
        with serve_qcowfuse(image, folder, *options) as mounted:
            loop = run("losetup", "-f", "--show", "--direct-io=on", str(mounted.file)).strip()
            tree = Path(tempfile.mkdtemp(dir=folder, prefix="ext4"))
            try:
                run("mkfs.ext4", "-q", loop)
                run("mount", loop, str(tree))
                before = mounted.counters()
                start = time.monotonic()
                line = run(
                    *("bonnie++", "-q", "-u", "root", "-d", str(tree), "-s", f"{size_mib}M"),
                    *("-r", str(size_mib // 2), "-n", "0", "-m", "q"),
                )
                elapsed = time.monotonic() - start
                after = mounted.counters()
            finally:
                run("umount", str(tree), check=False)
                run("losetup", "-d", loop, check=False)
                tree.rmdir()
        fields = line.strip().splitlines()[-1].split(",")
        reads, writes = (after[f"backend.{kind}"] - before[f"backend.{kind}"] for kind in ("reads", "writes"))
        # Fields of bonnie++ 1.98: 9 block write, 11 rewrite, 15 block read (KiB/s), 17 seeks/s.
        rows.append([name, f"{elapsed:.1f}", *(fields[index] for index in (9, 11, 15, 17)), str(reads), str(writes)])
        image.unlink()
    print(f"bonnie++ -s {size_mib}M on ext4 on a loop device, 4 KiB clusters, --debug-io-delay 100us\n")
    table(
        ["L2 cache", "s", "write KiB/s", "rewrite KiB/s", "read KiB/s", "seeks/s", "backend reads", "backend writes"],
        rows,
    )
