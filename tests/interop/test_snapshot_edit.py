"""qcowfuse-img snapshot and qemu-img snapshot on the same images: the same results, in any order of the two."""

from __future__ import annotations

import json
import random
import struct
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from qcowfuse.cli.img.main import main
from qcowfuse.driver.chain import open_image
from qcowfuse.tools.check import check_image
from tests.support import battery, qemu
from tests.support.matrix import MIB

KIB = 1 << 10


@dataclass(frozen=True)
class Shape:
    """An image to try: ``options`` of qemu-img create; ``most`` snapshots that its refcounts can take."""

    options: str
    size: int = 2 * MIB
    unit: int = 4 * KIB
    backing: bool = False
    compressed: bool = False
    most: int = 4


SHAPES = {
    "v3": Shape("compat=1.1", size=8 * MIB, unit=64 * KIB),
    "v2": Shape("compat=0.10,cluster_size=4k"),
    "512": Shape("cluster_size=512", size=MIB),
    "v2-512": Shape("compat=0.10,cluster_size=512", size=MIB),
    "backing": Shape("cluster_size=4k", backing=True),
    "refcount-2": Shape("cluster_size=4k,refcount_bits=2", most=1),
    "refcount-4": Shape("cluster_size=1k,refcount_bits=4"),
    "refcount-8": Shape("cluster_size=4k,refcount_bits=8"),
    "refcount-32": Shape("cluster_size=2k,refcount_bits=32"),
    "refcount-64": Shape("cluster_size=512,refcount_bits=64", size=MIB),
    "extended": Shape("cluster_size=16k,extended_l2=on", size=4 * MIB, unit=16 * KIB),
    "extended-backing": Shape("cluster_size=16k,extended_l2=on", size=4 * MIB, unit=16 * KIB, backing=True),
    "zlib": Shape("cluster_size=4k", compressed=True),
    "zstd": Shape("cluster_size=8k,compression_type=zstd", unit=8 * KIB, compressed=True),
    "lazy": Shape("cluster_size=4k,lazy_refcounts=on"),
}


@dataclass
class Model:
    """What an image must hold."""

    path: Path
    shape: Shape
    disk: bytearray
    chooser: random.Random
    snapshots: dict[str, bytes] = field(default_factory=dict)
    n_made: int = 0

    async def snapshot(self, *arguments: str) -> None:
        """``snapshot`` by one of the two programs."""
        if self.chooser.random() < 0.6:
            assert await trio.to_thread.run_sync(main, ["snapshot", *arguments, str(self.path)]) == 0
        else:
            qemu.must_run("qemu-img", "snapshot", *arguments, self.path)

    async def write(self) -> None:
        """A few writes, by QEMU or by us."""
        shape, chooser = self.shape, self.chooser
        n_units = len(self.disk) // shape.unit
        commands = []
        image = None if chooser.random() < 0.5 else await open_image(str(self.path))
        for _ in range(chooser.randint(1, 5)):
            start = chooser.randrange(n_units) * shape.unit
            n_bytes = min(chooser.randint(1, 8) * shape.unit, len(self.disk) - start)
            byte = chooser.randint(1, 255)
            kind = chooser.choice(["write", "write", "write -z", "write -zu", "partly"])
            if kind == "partly":
                start, n_bytes = start + 512, 512
            if image is not None:
                if "z" in kind:
                    await image.write_zeroes(start, n_bytes, unmap="u" in kind)
                else:
                    await image.write(start, bytes([byte]) * n_bytes)
            elif "z" in kind:
                commands.append(f"{kind} {start} {n_bytes}")
            else:
                compress = " -c" if shape.compressed and kind == "write" and chooser.random() < 0.7 else ""
                for part in range(start, start + n_bytes, shape.unit):
                    end = min(part + shape.unit, start + n_bytes)
                    if compress:  # QEMU does not compress over a cluster that the disk has alone
                        commands.append(f"write -zu {part} {end - part}")
                    commands.append(f"write{compress} -P {byte} {part} {end - part}")
            self.disk[start : start + n_bytes] = (bytes([0]) if "z" in kind else bytes([byte])) * n_bytes
        if image is not None:
            await image.aclose()
        elif commands:
            qemu.io(self.path, commands)

    async def create(self) -> None:
        """A new snapshot."""
        self.n_made += 1
        name = f"name{self.n_made}"
        await self.snapshot("-c", name)
        self.snapshots[name] = bytes(self.disk)

    async def apply(self) -> None:
        """Back to one of the snapshots."""
        name = self.chooser.choice(list(self.snapshots))
        await self.snapshot("-a", name)
        self.disk[:] = self.snapshots[name]

    async def delete(self) -> None:
        """One less."""
        name = self.chooser.choice(list(self.snapshots))
        await self.snapshot("-d", name)
        del self.snapshots[name]

    async def check(self, *, contents: bool) -> None:
        """QEMU and we find it consistent; with ``contents``, QEMU reads what must be there."""
        result = qemu.check(self.path)
        assert result.code == 0, result.text
        findings: list[str] = []
        await check_image(str(self.path), report=findings.append)
        assert not findings
        listed = [entry["name"] for entry in qemu.info(self.path).get("snapshots", [])]
        assert listed == list(self.snapshots)
        if contents:
            assert read_by_qemu(self.path) == self.disk
            for name, held in self.snapshots.items():
                assert read_by_qemu(self.path, name) == held, name


def read_by_qemu(path: Path, snapshot: str | None = None) -> bytes:
    target = path.with_suffix(".read")
    extra = [] if snapshot is None else ["-l", snapshot]
    qemu.must_run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", *extra, path, target)
    return target.read_bytes()


def make(folder: Path, shape: Shape) -> Model:
    path = folder / "image.qcow2"
    disk = bytearray(shape.size)
    if shape.backing:
        qemu.create(folder / "base.raw", "raw", shape.size // 2)
        qemu.io(folder / "base.raw", [f"write -P 200 0 {shape.size // 3 // 512 * 512}"], "raw")
        disk[: shape.size // 3 // 512 * 512] = bytes([200]) * (shape.size // 3 // 512 * 512)
        qemu.create(path, "qcow2", shape.size, options=shape.options, backing="base.raw", backing_format="raw")
    else:
        qemu.create(path, "qcow2", shape.size, options=shape.options)
    return Model(path, shape, disk, random.Random(shape.options))


@pytest.mark.parametrize("shape", SHAPES)
async def test_in_turn_with_qemu(shape: str, image_folder: Path) -> None:
    """Writes and snapshots by both programs at random: consistent after each step, the bytes right in the end."""
    model = make(image_folder, SHAPES[shape])
    for number in range(20):
        await model.write()
        steps = [model.create] if len(model.snapshots) < model.shape.most else []
        if model.snapshots:
            steps += [model.apply, model.delete] if number > 4 or not steps else [model.apply]
        await model.chooser.choice(steps)()
        await model.check(contents=number % 5 == 4)
    while model.snapshots:
        await model.delete()
    await model.check(contents=True)


def img(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def poke(path: Path, position: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(data)


@pytest.fixture
def image(image_folder: Path) -> Path:
    """4 MiB of data in clusters of 4 KiB."""
    path = image_folder / "image.qcow2"
    qemu.create(path, "qcow2", 4 * MIB, options="cluster_size=4k")
    qemu.io(path, ["write -P 1 0 4M"])
    return path


def test_the_list_is_qemus(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ids, names, sizes and dates: what one program writes the other lists; JSON as in ``qemu-img info``."""
    assert img("snapshot", "-l", image) == img("snapshot", image) == 0
    assert capsys.readouterr().out == ""
    assert img("snapshot", "--output=json", image) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert img("snapshot", "-c", "ours", image) == 0
    qemu.must_run("qemu-img", "snapshot", "-c", "theirs", image)
    assert img("snapshot", "-c", "ünï", image) == 0
    assert img("snapshot", "-l", "--output=json", "-U", image) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed == qemu.info(image)["snapshots"]
    assert [(entry["id"], entry["name"]) for entry in listed] == [("1", "ours"), ("2", "theirs"), ("3", "ünï")]
    assert abs(listed[0]["date-sec"] - listed[1]["date-sec"]) < 100
    assert img("snapshot", "-l", image) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:]] == [
        ["1", "ours"],
        ["2", "theirs"],
        ["3", "ünï"],
    ]


def test_the_map_of_a_snapshot(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The extents are those that the disk had then: data stays where it is."""
    qemu.io(image, ["write -z 1M 64k"])
    expected = qemu.map_extents(image)
    assert img("snapshot", "-c", "then", image) == 0
    qemu.io(image, ["write -P 2 0 4M"])
    for name in ("then", "1"):
        assert img("map", "--output=json", "--snapshot", name, image) == 0
        assert json.loads(capsys.readouterr().out) == expected
    assert img("map", "--output=json", image) == 0
    assert json.loads(capsys.readouterr().out) == qemu.map_extents(image) != expected
    assert img("map", "--snapshot", "nope", image) == 1


def test_ids_and_names(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """New ids follow the highest; -a looks for an id first, -d for a name, as QEMU does; names may be double."""
    for name in ("2", "1", "same", "same", ""):
        assert img("snapshot", "-c", name, image) == 0

    def listed() -> list[tuple[str, str]]:
        return [(entry["id"], entry["name"]) for entry in qemu.info(image)["snapshots"]]

    assert listed() == [("1", "2"), ("2", "1"), ("3", "same"), ("4", "same"), ("5", "")]
    assert img("snapshot", "-d", "1", image) == 0
    assert img("snapshot", "-d", "same", image) == 0
    assert img("snapshot", "-d", "5", image) == 0
    assert listed() == [("1", "2"), ("4", "same")]
    qemu.io(image, ["write -P 9 0 4k"])
    assert img("snapshot", "-c", "1", image) == 0
    assert img("snapshot", "-a", "1", image) == 0
    assert read_by_qemu(image) == bytes([1]) * 4 * MIB
    assert img("snapshot", "-a", "5", image) == 0
    assert read_by_qemu(image)[:4096] == bytes([9]) * 4096
    capsys.readouterr()
    for option in ("-a", "-d"):
        assert img("snapshot", option, "nope", image) == 1
        assert capsys.readouterr().err.endswith("no snapshot 'nope'; there are: 2 (id 1), same (id 4), 1 (id 5)\n")
    assert img("snapshot", "-c", "x" * 256, image) == 1
    assert "at most 255 bytes" in capsys.readouterr().err
    assert qemu.check(image).code == 0


@pytest.mark.parametrize("new", [MIB, 7 * MIB], ids=["shrunk", "grown"])
def test_applying_brings_the_size_back(new: int, image: Path, image_folder: Path) -> None:
    """A disk that was resized since gets the size and bytes of the snapshot, as with QEMU."""
    assert img("snapshot", "-c", "before", image) == 0
    qemu.must_run("qemu-img", "resize", "-q", "--shrink", image, str(new))
    qemu.io(image, [f"write -P 2 0 {new}"])
    assert img("snapshot", "-c", "after", image) == 0
    other = image_folder / "other.qcow2"
    other.write_bytes(image.read_bytes())
    assert img("snapshot", "-a", "before", image) == 0
    qemu.must_run("qemu-img", "snapshot", "-a", "before", other)
    assert qemu.check(image).code == 0
    assert qemu.info(image)["virtual-size"] == qemu.info(other)["virtual-size"] == 4 * MIB
    assert read_by_qemu(image) == read_by_qemu(other) == bytes([1]) * 4 * MIB
    assert img("snapshot", "-a", "2", image) == 0
    assert qemu.check(image).code == 0
    assert read_by_qemu(image) == bytes([2]) * new


def test_version_2_is_not_resized(image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """QEMU refuses to resize version 2 with snapshots, and so to apply one of another size; so do we."""
    path = image_folder / "image.qcow2"
    qemu.create(path, "qcow2", MIB, options="compat=0.10")
    assert img("snapshot", "-c", "before", path) == 0
    poke(path, 24, struct.pack(">Q", 2 * MIB))
    before = path.read_bytes()
    assert qemu.run("qemu-img", "snapshot", "-a", "before", path).code == 1
    assert img("snapshot", "-a", "before", path) == 1
    assert "version 2" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_the_vm_state_is_kept(image: Path) -> None:
    """What an L1 table maps behind the end of the disk, the state of a VM, is part of a snapshot and comes back."""
    poke(image, 24, struct.pack(">Q", 2 * MIB))
    assert img("snapshot", "-c", "vm", image) == 0
    (table,) = struct.unpack_from(">Q", image.read_bytes(), 64)
    poke(image, table + 32, struct.pack(">I", 2 * MIB))
    poke(image, table + 40, struct.pack(">Q", 2 * MIB))
    assert img("snapshot", "-c", "second", image) == 0
    listed = qemu.info(image)["snapshots"]
    assert [entry["vm-state-size"] for entry in listed] == [2 * MIB, 0]
    qemu.io(image, ["write -P 2 0 2M"])
    assert img("snapshot", "-d", "second", image) == 0
    assert img("snapshot", "-a", "vm", image) == 0
    assert qemu.check(image).code == 0
    poke(image, 24, struct.pack(">Q", 4 * MIB))
    assert read_by_qemu(image) == bytes([1]) * 4 * MIB
    assert img("snapshot", "-d", "vm", image) == 0
    assert qemu.check(image).code == 0


def test_unknown_extra_data_survives(image: Path) -> None:
    """Extra data of an entry that nobody here knows is the same after other snapshots came and went."""
    assert img("snapshot", "-c", "first", image) == 0
    data = image.read_bytes()
    (table,) = struct.unpack_from(">Q", data, 64)
    entry = data[table : table + 40 + 24 + 6]
    wider = entry[:36] + struct.pack(">I", 40) + entry[40:64] + b"known to nobody." + entry[64:]
    poke(image, table, wider)
    assert img("snapshot", "-c", "second", image) == 0
    assert img("snapshot", "-d", "second", image) == 0
    data = image.read_bytes()
    (table,) = struct.unpack_from(">Q", data, 64)
    assert data[table : table + len(wider)] == wider


def test_an_empty_disk(image_folder: Path) -> None:
    """A disk of 0 bytes has snapshots, too."""
    path = image_folder / "image.qcow2"
    qemu.create(path, "qcow2", 0)
    for arguments in (["-c", "one"], ["-a", "one"], ["-c", "two"], ["-d", "one"]):
        assert img("snapshot", *arguments, path) == 0
        assert qemu.check(path).code == 0
    qemu.must_run("qemu-img", "snapshot", "-d", "two", path)
    assert qemu.check(path).code == 0


def test_bitmaps(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bitmaps stay valid when snapshots come and go; applying, which would make them wrong, is refused as by QEMU."""
    qemu.must_run("qemu-img", "bitmap", "--add", image, "nightly")
    assert img("snapshot", "-c", "one", image) == 0
    assert qemu.info(image)["format-specific"]["data"]["bitmaps"][0]["flags"] == ["auto"]
    before = image.read_bytes()
    assert qemu.run("qemu-img", "snapshot", "-a", "one", image).code == 1
    image.write_bytes(before)
    assert img("snapshot", "-a", "one", image) == 1
    assert "bitmaps" in capsys.readouterr().err
    assert image.read_bytes() == before
    assert img("snapshot", "-d", "one", image) == 0
    assert qemu.info(image)["format-specific"]["data"]["bitmaps"][0]["flags"] == ["auto"]
    assert qemu.check(image).code == 0


def test_unknown_autoclear_bits_are_cleared(image: Path) -> None:
    """What nobody here keeps up to date is said to be out of date."""
    poke(image, 88, struct.pack(">Q", 1 << 40))
    assert img("snapshot", "-c", "one", image) == 0
    assert image.read_bytes()[88:96] == bytes(8)


def test_refcounts_of_one_bit(image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing can be shared: refused as by QEMU, and the image is what it was."""
    path = image_folder / "image.qcow2"
    qemu.create(path, "qcow2", MIB, options="refcount_bits=1")
    qemu.io(path, ["write -P 1 0 1M"])
    before = path.read_bytes()
    assert img("snapshot", "-c", "one", path) == 1
    assert "refcount of 1 bits holds no more than 1" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert qemu.run("qemu-img", "snapshot", "-c", "one", path).code == 1


def test_what_is_refused(image: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Version 1, external data files, dirty and corrupt images: one line each, nothing changed; lists work."""
    version_1, external = image_folder / "v1.img", image_folder / "external.qcow2"
    qemu.create(version_1, "qcow", MIB)
    qemu.create(external, "qcow2", MIB, options=f"data_file={image_folder}/data.raw")
    dirty, corrupt = image_folder / "dirty.qcow2", image_folder / "corrupt.qcow2"
    for path, bit in ((dirty, 1), (corrupt, 2)):
        path.write_bytes(image.read_bytes())
        poke(path, 72, struct.pack(">Q", bit))
    for path, word in (
        (version_1, "version 1"),
        (external, "external data file"),
        (dirty, "not closed cleanly"),
        (corrupt, "marked as corrupt"),
    ):
        before = path.read_bytes()
        for arguments in (["-c", "one"], ["-a", "one"], ["-d", "one"]):
            assert img("snapshot", *arguments, path) == 1
            said = capsys.readouterr().err
            assert word in said
            assert said.count("\n") == 1
        assert path.read_bytes() == before
        assert img("snapshot", "-l", path) == 0
    assert img("snapshot", "-U", "-c", "one", image) == 1
    assert "-U goes with -l" in capsys.readouterr().err
    assert img("snapshot", "-l", "-c", "one", image) == 1


async def test_an_image_in_use(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """While somebody writes to an image its snapshots can be listed with -U, and not be changed."""
    held = await open_image(str(image))
    try:
        assert await trio.to_thread.run_sync(img, "snapshot", "-c", "one", image) == 1
        assert "open for writing" in capsys.readouterr().err
        assert await trio.to_thread.run_sync(img, "snapshot", "-l", "-U", image) == 0
    finally:
        await held.aclose()
    assert await trio.to_thread.run_sync(img, "snapshot", "-c", "one", image) == 0


@pytest.mark.parametrize("change", ["-c", "-a", "-d"])
def test_damaged_images_are_left_alone(change: str, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """References without a count, tables out of place: refused before anything is written."""
    assert img("snapshot", "-c", "one", image) == 0
    qemu.io(image, ["write -P 2 1M 64k"])
    good = image.read_bytes()
    (l1_offset,) = struct.unpack_from(">Q", good, 40)
    (refcount_table,) = struct.unpack_from(">Q", good, 48)
    (block,) = struct.unpack_from(">Q", good, refcount_table)
    (snapshots_offset,) = struct.unpack_from(">Q", good, 64)
    (snapshot_l1,) = struct.unpack_from(">Q", good, snapshots_offset)
    first_l1 = l1_offset if change == "-c" else snapshot_l1
    (l2_offset,) = struct.unpack_from(">Q", good, first_l1)
    l2_offset &= (1 << 56) - 512
    (entry,) = struct.unpack_from(">Q", good, l2_offset + 8)
    cluster = (entry & (1 << 56) - 512) >> 12
    damages = {
        "no count": (block + 2 * cluster, bytes(2)),
        "unaligned data": (l2_offset + 8, struct.pack(">Q", entry + 512)),
        "unaligned table": (first_l1, struct.pack(">Q", l2_offset + 512)),
        "table outside": (first_l1, struct.pack(">Q", 1 << 40)),
        "data outside": (l2_offset + 8, struct.pack(">Q", 1 << 45)),
        "two on one cluster": (refcount_table, struct.pack(">Q", l1_offset)),
    }
    for name, (position, data) in damages.items():
        image.write_bytes(good)
        poke(image, position, data)
        before = image.read_bytes()
        capsys.readouterr()
        assert img("snapshot", change, "one", image) == 1, name
        said = capsys.readouterr().err
        assert ("left as it is" if (name, change) == ("table outside", "-c") else "nothing was changed") in said, name
        assert said.count("\n") == 1
        assert image.read_bytes() == before, name


async def test_an_encrypted_image_needs_no_key(image_folder: Path) -> None:
    """Snapshots of a LUKS image: QEMU, with the key, reads what was there, and finds it consistent."""
    path = image_folder / "image.qcow2"
    secret = ["--object", "secret,id=key,data=open"]
    opened = f"driver=qcow2,encrypt.key-secret=key,file.filename={path}"
    options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10,cluster_size=4k"
    qemu.must_run("qemu-img", "create", "-q", "-f", "qcow2", *secret, "-o", options, path, "1M")

    def write(byte: int) -> None:
        command = f"write -P {byte} 0 600k"
        qemu.must_run("qemu-io", *secret, "--image-opts", opened, "-c", command)

    def verify(byte: int) -> None:
        assert qemu.run("qemu-img", "check", *secret, "--image-opts", opened).code == 0
        command = f"read -P {byte} 0 600k"
        assert "verification failed" not in qemu.must_run("qemu-io", *secret, "--image-opts", opened, "-c", command)

    write(1)
    assert await trio.to_thread.run_sync(img, "snapshot", "-c", "one", path) == 0
    verify(1)
    write(2)
    assert await trio.to_thread.run_sync(img, "snapshot", "-c", "two", path) == 0
    assert await trio.to_thread.run_sync(img, "snapshot", "-a", "one", path) == 0
    verify(1)
    assert await trio.to_thread.run_sync(img, "snapshot", "-a", "two", path) == 0
    assert await trio.to_thread.run_sync(img, "snapshot", "-d", "one", path) == 0
    verify(2)


async def test_we_write_on(image: Path) -> None:
    """A disk that was given back to a snapshot is written by us, and both keep their bytes."""
    assert await trio.to_thread.run_sync(img, "snapshot", "-c", "one", image) == 0
    qemu.io(image, ["write -P 2 0 1M"])
    assert await trio.to_thread.run_sync(img, "snapshot", "-a", "one", image) == 0
    opened = await open_image(str(image))
    await opened.write(5000, b"x" * 9000)
    expected = await battery.read(opened, 0, opened.size)
    await opened.aclose()
    assert qemu.check(image).code == 0
    assert read_by_qemu(image) == expected
    assert read_by_qemu(image, "one") == bytes([1]) * 4 * MIB
