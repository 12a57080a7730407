"""qcowfuse-img map of chains in pieces, whatever these are, beside qemu-img map: entry by entry."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from qcowfuse.cli.img.main import main
from tests.support import qemu

N_OPERATIONS = 40
FORMATS = {
    "version 1": ("qcow", "", 4096),
    "version 2": ("qcow2", "compat=0.10,cluster_size=512", 512),
    "version 3": ("qcow2", "cluster_size=1k,compression_type=zstd", 1024),
    "large clusters": ("qcow2", "cluster_size=64k", 65536),
    "extended": ("qcow2", "cluster_size=16k,extended_l2=on", 16384),
    "data file": ("qcow2", "cluster_size=4k,data_file={}.data", 4096),
    "preallocated": ("qcow2", "cluster_size=4k,preallocation=metadata", 4096),
    "raw": ("raw", "", 512),
}


def make(path: Path, kind: str, chooser: random.Random, size: int, base: tuple[Path, str] | None) -> None:
    """An image of that kind, with operations all over it; small disks make tables of which much is in use."""
    format_name, options, cluster_size = FORMATS[kind]
    if base is not None and format_name == "qcow":
        cluster_size = 512  # QEMU's choice
    words = ["-o", options.format(path)] if options else []
    words += [] if base is None else ["-b", str(base[0]), "-F", base[1]]
    qemu.must_run("qemu-img", "create", "-q", "-f", format_name, *words, path, str(size))
    commands = []
    if kind not in ("raw", "data file", "preallocated"):
        # First, and nowhere twice: QEMU compresses over nothing that is there.
        for cluster in chooser.sample(range(size // cluster_size), min(size // cluster_size, 20)):
            commands.append(f"write -c -P 7 {cluster * cluster_size} {cluster_size}")
    operations = ["write"] * 3 + ["write -z", "write -z -u", "discard"] * (format_name != "qcow")
    for number in range(N_OPERATIONS):
        operation = chooser.choice(operations)
        start = chooser.randrange(size // 512)
        n_sectors = chooser.choice([1, 2, 7, 40]) * chooser.choice([512, cluster_size]) // 512
        pattern = f" -P {number + 10}" if operation == "write" else ""
        commands.append(f"{operation}{pattern} {start * 512} {min(n_sectors, size // 512 - start) * 512}")
    qemu.io(path, commands, format_name)


@pytest.mark.parametrize("seed", range(24))
def test_says_what_qemu_img_says(seed: int, image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Chains of one to three images, each of a format and a size of its own."""
    chooser = random.Random(seed)
    uppermost = [kind for kind in FORMATS if kind not in ("raw", "preallocated")]
    kinds = [uppermost[seed % len(uppermost)]]
    kinds += [
        chooser.choice([kind for kind in FORMATS if kind != "preallocated"]) for _ in range(chooser.randrange(3))
    ]
    if seed % 5 == 4:
        kinds = ["preallocated"]
    if "raw" in kinds:
        kinds = kinds[: kinds.index("raw") + 1]
    base: tuple[Path, str] | None = None
    for depth in reversed(range(len(kinds))):
        path = image_folder / f"{depth}"
        size = chooser.choice([1 << 20, 3 << 20, (1 << 20) + 512 * chooser.randrange(100)])
        make(path, kinds[depth], chooser, size, base)
        if kinds[depth] == "raw" and chooser.randrange(2):
            with path.open("r+b") as file:
                file.truncate(size - 512 + chooser.randrange(1, 512))  # QEMU counts the whole sector
        base = path, FORMATS[kinds[depth]][0]
    assert base is not None
    expected = qemu.map_extents(*base)
    words = ["--backing-format", "auto"] if "version 1" in kinds[:-1] else []  # which version 1 does not name
    assert main(["map", "--output=json", *words, str(base[0])]) == 0
    said = capsys.readouterr().out
    assert json.loads(said) == expected, kinds
    assert said == "[" + ",\n".join(map(json.dumps, json.loads(said))) + "]\n"
    assert main(["map", *words, str(base[0])]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [(int(line.split()[0], 16), int(line.split()[1], 16)) for line in lines] == [
        (entry["start"], entry["length"]) for entry in expected
    ]
