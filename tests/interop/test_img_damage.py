"""qcowfuse-img check and its repairs on damaged images: the verdict, the counts and the outcome of qemu-img.

Where they may differ, and why:

1. ``STRICTER``: the zero flag in version 2. QEMU's check says nothing, and QEMU then refuses to read it.
2. Repairs that QEMU gives up (exit code 1), although all is known that it takes: a refcount table entry at an
   impossible place ("No medium found"), one with reserved bits ("Preventing invalid write"), one past the end of the
   file ("Cannot allocate memory"). Here they come to their end.
3. A refcount block past the end of the file: QEMU makes the file that long, up to petabytes; here the structure is
   rebuilt, so that sums of what was mended and places differ.
4. An L1 entry that makes the header an L2 table: each change of the header by QEMU is then another finding.
5. A snapshot table past the end of the file: both write a new one, QEMU does not count it as mended, and leaks.
6. After ``-r all`` the new structures lie elsewhere: behind the end, where no lost data can be.
7. QEMU's ``check -r`` writes the header when it opens an image with bitmaps or unknown autoclear bits, and has not
   read the snapshots then: it loses them all. Here they stay.
8. Snapshots without a place for their table, or more than there can be: QEMU takes the header for a table, or counts
   the rest of the file as one, and stops; here they go.
9. An entry that is made zero has lost its reserved bits too: QEMU counts that as mended only when it rebuilds.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from qcowfuse.cli.img.main import main
from tests.support import qemu
from tests.support.damage import Tables, damage_at_random
from tests.support.matrix import ImageSpec, all_specs, build

NAMES = (
    "v2-cluster-512",
    "v3-cluster-64k",
    "v3-refcount-1-cluster-4k",
    "v3-refcount-64-cluster-512",
    "v3-extended-16k",
    "v3-extended-16k-snapshot",
    "v3-deflate-cluster-4k-compressed",
    "v3-cluster-512-snapshots",
    "v3-bitmaps-cluster-512",
    "v3-zero-clusters-preallocated-4k",
    "v3-data-file-cluster-4k",
)
SPECS = {spec.id: spec for spec in all_specs() if spec.id in NAMES}
ROUNDS = 8
COUNTS = (
    "leaks",
    "corruptions",
    "check-errors",
    "allocated-clusters",
    "total-clusters",
    "fragmented-clusters",
    "compressed-clusters",
    "image-end-offset",
    "leaks-fixed",
    "corruptions-fixed",
)
STRICTER = "which this image cannot have"
MADE_ZERO = "now reads as zeroes"
HEADER_AS_TABLE = "Overlap: header"
TABLE_OUTSIDE = re.compile(r"ERROR snapshot table at .* lies past the end of the file")
BLOCK_OUTSIDE = re.compile(r"ERROR refcount block .* lies past the end of the file")


class Judges:
    """Both programs on copies of the same damaged image."""

    def __init__(self, ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.ours = ours
        self.theirs = ours.with_name("theirs.qcow2")
        self.capsys = capsys
        self.n_compared = 0

    def judge(self, data: bytes, repair: str | None) -> None:
        """Check, or repair, and compare what can be compared."""
        self.ours.write_bytes(data)
        self.theirs.write_bytes(data)
        words = ["-r", repair] if repair else []
        judged = qemu.run("qemu-img", "check", "-f", "qcow2", *words, "--output=json", self.theirs)
        code = main(["check", *words, "--output=json", str(self.ours)])
        said = self.capsys.readouterr()
        where = f"{repair}: {judged.stderr[:2000]}\n--- ours: {code}\n{said.err[:2000]}"
        if repair is None:
            assert self.ours.read_bytes() == data
        if not judged.stdout:
            # QEMU did not even open it (a bitmap's table, for one): then the image is not fine for us either, unless
            # there was something to repair (2).
            assert code or repair, where
        elif STRICTER not in said.err and not (repair and _is_other_story(data, said.err)):
            assert code == judged.code, where
            self._compare(json.loads(said.out), json.loads(judged.stdout), said.err, repair, where)
        if repair and said.out and STRICTER not in said.err:
            self._compare_outcome(code, judged.code, where)

    def _compare(
        self, ours: dict[str, Any], theirs: dict[str, Any], err: str, repair: str | None, where: str
    ) -> None:
        counts = list(COUNTS)
        if repair == "all":
            counts.remove("image-end-offset")
            if BLOCK_OUTSIDE.search(err) or ("reserved bits" in err and MADE_ZERO in err):
                counts.remove("corruptions-fixed")
        found = {name: (ours.get(name, 0), theirs.get(name, 0)) for name in counts}
        assert all(one == other for one, other in found.values()), f"{found}\n{where}"
        self.n_compared += 1

    def _compare_outcome(self, code: int, their_code: int, where: str) -> None:
        """qemu-img says the same of what we have mended as we do, and the guest reads the same as after QEMU."""
        again = qemu.run("qemu-img", "check", "-f", "qcow2", self.ours)
        assert again.code == code, f"{again.stdout}{again.stderr}\n{where}"
        if code == their_code == 0:
            read = qemu.run("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", self.ours, self.theirs)
            # 1: something differs. Others: QEMU cannot read what it calls clean (broken streams, strange offsets).
            assert read.code != 1, f"{read.stdout}{read.stderr}\n{where}"


def _is_other_story(data: bytes, err: str) -> bool:
    """Rules 4, 5, 7 and 8: QEMU's repair does other things, or more, than it says."""
    tables = Tables(data)
    forgets_snapshots = tables.n_snapshots and tables.version >= 3 and tables.u64(88)
    if HEADER_AS_TABLE in err or "Repaired header" in err:
        return True
    return bool(TABLE_OUTSIDE.search(err)) or bool(forgets_snapshots)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_agrees_with_qemu_img_on_damage(name: str, image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After random damage to tables and header, check and repair end as qemu-img's do, wherever it has a verdict."""
    spec: ImageSpec = SPECS[name]
    built = build(spec, image_folder)
    whole = built.path.read_bytes()
    cluster_size = qemu.info(built.path)["cluster-size"]
    rng = random.Random(name)
    judges = Judges(built.path, capsys)
    for number in range(ROUNDS):
        data = bytearray(whole)
        damage_at_random(rng, data, cluster_size)
        judges.judge(bytes(data), None)
        judges.judge(bytes(data), "all")
        if number % 3 == 0:
            judges.judge(bytes(data), "leaks")
    assert judges.n_compared > ROUNDS
