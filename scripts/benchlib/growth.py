"""Whether cost grows with the disk: time per operation and memory from 1 GiB to 16 TiB, and on long chains."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from . import images
from .contenders import Contender
from .row import Settings
from .tools import fio, run, table

_SIZES = (("1 GiB", 1 << 10), ("16 GiB", 1 << 14), ("256 GiB", 1 << 18), ("1 TiB", 1 << 20), ("16 TiB", 1 << 24))
_CHAINS = (1, 2, 5, 10)


def bench_growth(contenders: list[Contender], settings: Settings) -> None:
    """Disks of which every cluster is mapped; then chains in which the lowest image holds everything."""
    rows = []
    for name, size_mib in _SIZES[: 3 if settings.quick else None]:
        folder = Path(tempfile.mkdtemp(dir=settings.folder))
        images.mapped(folder, size_mib)
        for contender in contenders:
            rows.append([name, contender.name, *_figures(contender, folder / images.IMAGE, folder, settings)])
        shutil.rmtree(folder)
    header = ["", "contender", "start-up ms", "us/read", "us/read in 256 MiB", "resident MiB"]
    print("4 KiB random reads, direct, depth 1; disks of which every cluster is mapped\n")
    table(["disk", *header[1:]], rows)
    rows = []
    for n_layers in _CHAINS:
        folder = Path(tempfile.mkdtemp(dir=settings.folder))
        images.full(folder, 256)
        (folder / images.IMAGE).rename(folder / "layer0.qcow2")
        for number in range(1, n_layers):
            backing = ("-b", f"layer{number - 1}.qcow2", "-F", "qcow2")
            run("qemu-img", "create", "-q", "-f", "qcow2", *backing, f"layer{number}.qcow2", cwd=folder)
        for contender in contenders:
            if n_layers > 1 and "chain" in contender.unable:
                continue
            image = folder / f"layer{n_layers - 1}.qcow2"
            rows.append([str(n_layers), contender.name, *_figures(contender, image, folder, settings)])
        shutil.rmtree(folder)
    print("\nthe same on chains of empty images over a full one of 256 MiB\n")
    table(["layers", *header[1:]], rows)


def _figures(contender: Contender, image: Path, folder: Path, settings: Settings) -> list[str]:
    with contender.serve(image, folder) as served:
        ready = time.monotonic() - served.started
        everywhere = fio(served.file, "randread", "4k", seconds=settings.seconds)
        narrow = fio(served.file, "randread", "4k", seconds=settings.seconds, options=("--size=256M",))
        memory = served.resident_mib()
    times = [f"{1e6 / result['iops']:.1f}" for result in (everywhere, narrow)]
    return [f"{1000 * ready:.0f}", *times, f"{memory:.0f}"]
