"""Partition tables made by sfdisk and sgdisk: the same partitions as those programs list, and the listing itself."""

from __future__ import annotations

import json
import random
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qcowfuse.cli.img.main import main
from qcowfuse.partitions.table import find_table
from qcowfuse.partitions.values import PartitionTable
from tests.support import qemu
from tests.support.partition_tables import answer

SIZE = 64 << 20
N_SECTORS = SIZE // 512
NAMES = ("root", "EFI System", "\u00e4\u00f6", "x" * 36, "\u4e2d\u6587")


def make_disk(path: Path, script: str) -> Path:
    """A sparse disk with the table that ``script`` tells sfdisk."""
    with path.open("wb") as file:
        file.truncate(SIZE)
    words = ["sfdisk", "-q", "--no-reread", "--no-tell-kernel", str(path)]
    subprocess.run(words, input=script, text=True, check=True, timeout=qemu.TIMEOUT)
    return path


def table_of(path: Path) -> PartitionTable:
    data = path.read_bytes()
    return answer(find_table(len(data)), data)


def listed(path: Path) -> dict[str, Any]:
    """What sfdisk says of the table."""
    found: dict[str, Any] = json.loads(qemu.must_run("sfdisk", "--json", path))["partitiontable"]
    return found


def assert_as_sfdisk_lists(path: Path) -> PartitionTable:
    table, theirs = table_of(path), listed(path)
    assert (table.problems, table.sector_size) == ((), theirs["sectorsize"])
    assert table.kind == {"gpt": "gpt", "dos": "mbr"}[theirs["label"]]
    assert table.disk_id == theirs["id"].lower().removeprefix("0x")
    ours = []
    for partition in table.partitions:
        assert not partition.problem
        found: dict[str, Any] = {
            "node": f"{path}{partition.number}",
            "start": partition.start // 512,
            "size": partition.n_bytes // 512,
            "type": partition.type_id.upper() if table.kind == "gpt" else partition.type_id.lstrip("0"),
        }
        if table.kind == "gpt":
            found["uuid"] = partition.uuid.upper()
            if partition.label:
                found["name"] = partition.label
            if partition.is_bootable:
                found["attrs"] = "LegacyBIOSBootable"
        elif partition.is_bootable:
            found["bootable"] = True
        ours.append(found)
    assert ours == theirs.get("partitions", [])
    return table


def random_gpt(chooser: random.Random) -> str:
    """Partitions apart from each other, in any order, some numbers left out."""
    lines, at = ["label: gpt"], 2048
    entries = []
    for number in sorted(chooser.sample(range(1, 129), chooser.randint(0, 12))):
        n_sectors = chooser.randint(1, 4000)
        words = [f"start={at}", f"size={n_sectors}"]
        if chooser.random() < 0.6:
            words.append(f'name="{chooser.choice(NAMES)}"')
        if chooser.random() < 0.5:
            words.append(f"type={chooser.choice('LSUVR')}")
        if chooser.random() < 0.2:
            words.append('attrs="LegacyBIOSBootable"')
        entries.append((number, ", ".join(words)))
        at += n_sectors + chooser.randint(0, 3000)
    return "\n".join([*lines, *(f"/dev/disk{number} : {words}" for number, words in entries), ""])


def random_mbr(chooser: random.Random) -> str:
    """Primary partitions, and in the last of them logical ones, or not."""
    lines, at = ["label: dos"], 2048
    n_primary = chooser.randint(0, 3)
    for _ in range(n_primary):
        n_sectors = chooser.randint(1, 9000)
        lines.append(
            f"start={at}, size={n_sectors}, type={chooser.choice(('83', '82', '7', 'c', '8e'))}"
            f"{', bootable' if chooser.random() < 0.3 else ''}"
        )
        at += n_sectors + chooser.randint(0, 2000)
    if chooser.random() < 0.7:
        lines.append(f"start={at}, size={N_SECTORS - at}, type={chooser.choice('5f')}")
        at += 2048
        for _ in range(chooser.randint(0, 9)):
            n_sectors = chooser.randint(1, 4000)
            lines.append(f"start={at}, size={n_sectors}, type={chooser.choice(('83', '82', 'b'))}")
            at += n_sectors + 2048 + chooser.randint(0, 1000)  # sfdisk wants that much room for a link
    return "\n".join([*lines, ""])


@pytest.mark.parametrize("seed", range(5))
def test_random_tables_are_listed_as_sfdisk_lists_them(tmp_path: Path, seed: int) -> None:
    """Places, sizes, types, names, UUIDs and flags of GPT and MBR, logical partitions too."""
    chooser = random.Random(seed)
    path = tmp_path / "disk"
    for _ in range(3):
        for make in (random_gpt, random_mbr):
            assert_as_sfdisk_lists(make_disk(path, make(chooser)))


def test_a_damaged_table_is_read_as_sfdisk_reads_it(tmp_path: Path) -> None:
    """From the backup, the same partitions."""
    path = make_disk(tmp_path / "disk", 'label: gpt\nsize=8M, name="boot"\nsize=+\n')
    whole = table_of(path)
    for place in (512, 600, 1024 + 30):
        data = bytearray(path.read_bytes())
        data[place : place + 4] = b"\xff" * 4
        path.write_bytes(data)
        found = table_of(path)
        assert found.partitions == whole.partitions
        assert "the primary table is damaged" in found.problems[0]
        theirs = listed(path)["partitions"]
        assert [entry["start"] * 512 for entry in theirs] == [partition.start for partition in found.partitions]


def test_tables_by_sgdisk(tmp_path: Path) -> None:
    """Another program, with a hybrid MBR, a flag and a name; and what it made an MBR of."""
    path = make_disk(tmp_path / "disk", "label: gpt\n")
    words = ("-n", "2:2048:+4M", "-c", "2:EFI", "-t", "2:ef00", "-n", "7:0:0", "-c", "7:root", "-A", "7:set:2")
    qemu.must_run("sgdisk", *words, path)
    table = assert_as_sfdisk_lists(path)
    assert [(part.number, part.label, part.is_bootable) for part in table.partitions] == [
        (2, "EFI", False),
        (7, "root", True),
    ]
    qemu.must_run("sgdisk", "-h", "2", path)
    hybrid = table_of(path)
    assert hybrid.partitions == table.partitions
    assert "partitions of its own" in hybrid.problems[0]
    qemu.must_run("sgdisk", "-m", "2:7", path)
    assert [part.start for part in assert_as_sfdisk_lists(path).partitions] == [
        part.start for part in table.partitions
    ]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A GPT with ext4 in partition 2, with a label that has a line feed in it, as an image."""
    script = 'label: gpt\nsize=8M, type=U, name="boot"\nsize=16M, name="a"\nsize=16M, type=S\n'
    raw = make_disk(tmp_path / "disk.raw", script)
    qemu.must_run("sgdisk", "-c", "2:one\ntwo\033[31m", raw)
    part = tmp_path / "part"
    with part.open("wb") as file:
        file.truncate(16 << 20)
    qemu.must_run("mkfs.ext4", "-q", "-F", part)
    with raw.open("r+b") as disk:
        disk.seek(9 << 20)
        disk.write(part.read_bytes())
    path = tmp_path / "disk.qcow2"
    qemu.must_run("qemu-img", "convert", "-O", "qcow2", raw, path)
    return path


def test_the_listing_as_json(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes, types, labels as they are, file systems."""
    before = image.read_bytes()
    assert main(["partitions", "--output=json", str(image)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in ("filename", "virtual-size", "table", "sector-size", "problems")} == {
        "filename": str(image),
        "virtual-size": SIZE,
        "table": "gpt",
        "sector-size": 512,
        "problems": [],
    }
    first, second, third = found["partitions"]
    assert (first["type-name"], first["label"], first["filesystem"]) == ("EFI System", "boot", None)
    assert (second["number"], second["start"], second["size"]) == (2, 9 << 20, 16 << 20)
    assert (second["label"], second["filesystem"]) == ("one\ntwo\033[31m", "ext4")
    assert (third["type-name"], third["label"], third["bootable"], third["problem"]) == (
        "Linux swap",
        None,
        False,
        None,
    )
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", second["uuid"])
    assert image.read_bytes() == before


def test_the_listing_as_text(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each, whatever is in its label."""
    assert main(["partitions", str(image)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("partition table: gpt, sectors of 512 bytes, ")
    assert lines[3].split()[:3] == ["No", "Start", "Bytes"]
    assert lines[5].startswith(" 2   9437184  16777216  16 MiB")
    assert "ext4" in lines[5]
    assert lines[5].endswith("one?two?[31m")
    assert len(lines) == 7


def test_what_is_wrong_is_in_the_listing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the table, and of a partition; the exit code is 0: the image itself is in order."""
    raw = make_disk(tmp_path / "disk.raw", "label: dos\nstart=2048,size=1000\nstart=4096,size=1000\n")
    with raw.open("r+b") as disk:
        disk.seek(446 + 8)
        disk.write((4000).to_bytes(4, "little"))
    image = tmp_path / "disk.qcow2"
    qemu.must_run("qemu-img", "convert", "-O", "qcow2", raw, image)
    assert main(["partitions", str(image)]) == 0
    said = capsys.readouterr().out
    assert "problem of 1: it lies over partition 2\n" in said
    assert "problem of 2: it lies over partition 1\n" in said


def test_a_disk_without_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a file system for all of it, and with nothing."""
    raw, image = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    with raw.open("wb") as file:
        file.truncate(16 << 20)
    qemu.must_run("mkfs.ext4", "-q", "-F", raw)
    qemu.must_run("qemu-img", "convert", "-O", "qcow2", raw, image)
    assert main(["partitions", str(image)]) == 0
    assert "partition table: none; the disk is one file system, ext4\n" in capsys.readouterr().out
    qemu.create(image, "qcow2", 0)
    assert main(["partitions", "--output=json", str(image)]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "filename": str(image),
        "virtual-size": 0,
        "table": None,
        "filesystem": None,
        "problems": [],
        "partitions": [],
    }


def test_an_encrypted_disk_needs_its_passphrase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As for all that reads the disk."""
    raw = make_disk(tmp_path / "disk.raw", 'label: gpt\nsize=8M, name="inside"\n')
    key, image = tmp_path / "key", tmp_path / "disk.qcow2"
    key.write_text("secret")
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    words = ("--object", f"secret,id=s,file={key}", "-O", "qcow2", "-o", options)
    qemu.must_run("qemu-img", "convert", *words, raw, image)
    assert main(["partitions", "--key-file", str(key), str(image)]) == 0
    assert "inside" in capsys.readouterr().out
    key.write_text("wrong")
    assert main(["partitions", "--key-file", str(key), str(image)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_snapshot_has_a_table_of_its_own(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the disk had then, although it has none now."""
    qemu.must_run("qemu-img", "snapshot", "-c", "then", image)
    qemu.io(image, [f"write -z 0 {SIZE}"])
    assert main(["partitions", str(image)]) == 0
    assert "partition table: none\n" in capsys.readouterr().out
    assert main(["partitions", "--snapshot", "then", str(image)]) == 0
    assert "ext4" in capsys.readouterr().out
