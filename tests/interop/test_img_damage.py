"""qcowfuse-img check on damaged images: the same verdict and the same counts as qemu-img check."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from qcowfuse.cli.img import main
from tests.support import qemu
from tests.support.matrix import ImageSpec, all_specs, build

NAMES = (
    "v2-cluster-512",
    "v3-cluster-64k",
    "v3-refcount-1-cluster-4k",
    "v3-refcount-64-cluster-512",
    "v3-extended-16k",
    "v3-deflate-cluster-4k-compressed",
    "v3-cluster-512-snapshots",
    "v3-bitmaps-cluster-512",
)
SPECS = {spec.id: spec for spec in all_specs() if spec.id in NAMES}
ROUNDS = 20
COUNTS = (
    "leaks",
    "corruptions",
    "check-errors",
    "allocated-clusters",
    "total-clusters",
    "image-end-offset",
    "fragmented-clusters",
)


def damage(rng: random.Random, data: bytearray, cluster_size: int) -> None:
    """Change some bits, mostly where words are not zero, behind the header."""
    words = [place for place in range(cluster_size, len(data) - 8, 8) if data[place : place + 8] != bytes(8)]
    tables = [place for place in words if data[place] in (0, 0x40, 0x80)] or words
    for _ in range(rng.randint(1, 3)):
        place = rng.choice(tables) + rng.randrange(8)
        data[place] ^= 1 << rng.randrange(8)


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_qemu_img_on_damage(name: str, image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After random bit flips in tables, counts and exit code are qemu-img's, wherever it has a verdict."""
    spec: ImageSpec = SPECS[name]
    built = build(spec, image_folder)
    whole = built.path.read_bytes()
    cluster_size = qemu.info(built.path)["cluster-size"]
    rng = random.Random(name)
    n_corrupt = 0
    for number in range(ROUNDS):
        data = bytearray(whole)
        damage(rng, data, cluster_size)
        built.path.write_bytes(data)
        judged = qemu.run("qemu-img", "check", "-f", "qcow2", "--output=json", built.path)
        code = main(["check", "--output=json", str(built.path)])
        said = capsys.readouterr()
        if not judged.stdout:
            # QEMU did not even open it (a bitmap's table, for one): then the image is not fine for us either.
            assert code, (number, judged.stderr)
            continue
        ours, theirs = json.loads(said.out), json.loads(judged.stdout)
        n_corrupt += "corruptions" in theirs
        # Rule 4 of the checker: the one thing in which it is stricter on purpose.
        n_stricter = said.err.count("which this image cannot have")
        assert code == judged.code or n_stricter, (number, judged.stderr, said.err)
        ours["corruptions"] = ours.get("corruptions", 0) - n_stricter
        found = [(ours.get(key, 0), theirs.get(key, 0)) for key in COUNTS]
        assert all(one == other for one, other in found), (number, found, judged.stderr, said.err)
    assert n_corrupt > 0
