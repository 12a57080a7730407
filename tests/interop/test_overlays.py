"""Writes over an image that is only read: every kind of image below, thrown away or kept, and what is refused."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from qcowfuse.cli.img.create_options import parse_create_options
from qcowfuse.cli.img.main import main
from qcowfuse.driver.chain import open_image
from qcowfuse.driver.image import Image
from qcowfuse.driver.options import OpenOptions
from qcowfuse.errors import ImageLockedError, ImageUsageError, WrongKeyError
from qcowfuse.tools import new_file
from qcowfuse.tools.create import create_image
from qcowfuse.tools.create_encryption import Encryption
from qcowfuse.tools.overlay import EphemeralOverlay, KeptOverlay
from tests.support import battery, qemu
from tests.support.images import PASSPHRASE, passphrase, secret_arguments
from tests.support.matrix import ImageSpec, all_specs, build
from tests.support.mounting import environment
from tests.support.oracle import DiskModel, first_difference, reference_bytes, reference_window

MIB = 1 << 20
SPECS = {spec.id: spec for spec in all_specs()}
NAMES = [
    "v2-cluster-512",
    "v3-cluster-2M",
    "v3-size-0",
    "v3-size-no-sectors-cluster-512",
    "v3-size-1049088-cluster-512",
    "v3-grown",
    "v2-zeroes-over-backing",
    "v3-zstd-cluster-64k-compressed",
    "v3-extended-64k-zeroes",
    "v3-data-file-cluster-4k-zeroes",
    "v3-data-file-raw-extended-64k",
    "v1-size-1049088",
    "v1-compressed",
    "v1-over-v3",
    "chain-2M-512-64k",
    "over-raw-of-1048699",
    "backing-in-subfolder",
    "absolute-backing",
    "v3-snapshots",
    "v3-lazy-refcounts-clean",
    "v3-unknown-bits",
    "v3-bitmaps",
]
WITH_KEY = OpenOptions(passphrase=passphrase)


def all_files(folder: Path) -> dict[str, bytes]:
    """What each file below ``folder`` holds."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", NAMES)
async def test_a_kept_overlay_over_every_kind(name: str, image_folder: Path) -> None:
    """It is written as any image is, QEMU finds it sound and shows its bytes, and what was there stays."""
    spec: ImageSpec = SPECS[name]
    built = build(spec, image_folder)
    before = all_files(image_folder)
    overlay = image_folder / "overlay.qcow2"
    expected = reference_bytes(built.path, spec.format_name)

    async def open_it() -> Image:
        return await open_image(str(built.path), built.options, overlay=KeptOverlay(str(overlay)))

    model = await battery.check_image(open_it, expected)
    assert qemu.check(overlay).clean
    assert not first_difference(reference_bytes(overlay, "qcow2"), model.data)
    qemu.must_run("qemu-img", "info", "--backing-chain", overlay)
    found = all_files(image_folder)
    found.pop("overlay.qcow2")
    assert found == before


@pytest.mark.parametrize("name", NAMES[::2])
async def test_throw_away_writes_over_every_kind(name: str, image_folder: Path) -> None:
    """Two at once beside a reader: each has its own bytes, nothing is left of them, and nothing else has changed."""
    spec = SPECS[name]
    built = build(spec, image_folder)
    before = all_files(image_folder)
    expected = reference_bytes(built.path, spec.format_name)
    reader = await open_image(str(built.path), built.options._replace(read_only=True))
    images = [await open_image(str(built.path), built.options, overlay=EphemeralOverlay()) for _ in range(2)]
    models = [DiskModel(expected), DiskModel(expected)]
    try:
        for number, (image, model) in enumerate(zip(images, models, strict=True)):
            await battery.check_writes(image, model, seed=number, n_writes=12)
        for image, model in zip(images, models, strict=True):
            await battery.check_reads(image, model.data, n_random=10)
        await battery.check_reads(reader, expected, n_random=10)
        assert all_files(image_folder) == before
    finally:
        for image in (*images, reader):
            await image.aclose()
    assert all_files(image_folder) == before


async def test_writes_over_a_snapshot(tmp_path: Path) -> None:
    """The disk of then, with its size, can be written; the snapshot stays."""
    image = tmp_path / "disk.qcow2"
    qemu.create(image, "qcow2", "4M")
    qemu.io(image, ["write -P 1 0 4M"])
    qemu.must_run("qemu-img", "snapshot", "-c", "then", image)
    qemu.io(image, ["write -P 2 0 4M"])
    qemu.must_run("qemu-img", "resize", "-q", image, "8M")
    before = image.read_bytes()
    opened = await open_image(str(image), OpenOptions(snapshot="then"), overlay=EphemeralOverlay())
    try:
        assert (opened.size, opened.read_only) == (4 * MIB, False)
        await opened.write(100, b"new")
        await opened.flush()
        assert bytes(await opened.read(98, 7)) == b"\1\1new\1\1"
    finally:
        await opened.aclose()
    assert image.read_bytes() == before


@pytest.mark.parametrize("name", ["v3-1E-cluster-2M", "v1-4G"])
async def test_an_overlay_of_a_very_large_disk(name: str, image_folder: Path) -> None:
    """Its clusters are as small as they can be for that size, 64 KiB at least."""
    spec = SPECS[name]
    built = build(spec, image_folder)
    overlay = image_folder / "overlay.qcow2"
    image = await open_image(str(built.path), built.options, overlay=KeptOverlay(str(overlay)))
    try:
        size = image.size
        await image.write(size - 5, b"last.")
    finally:
        await image.aclose()
    said = qemu.info(overlay)
    assert (said["virtual-size"], said["cluster-size"]) == (size, 2 * MIB if size > 1 << 50 else 65536)
    assert qemu.check(overlay).clean
    assert reference_window(overlay, "qcow2", guest_offset=size - MIB, n_bytes=MIB)[-5:] == b"last."


async def test_commit_puts_it_into_the_image(tmp_path: Path) -> None:
    """qemu-img commit of a kept overlay: the image shows what was written through the mount."""
    image, overlay = tmp_path / "disk.qcow2", tmp_path / "o.qcow2"
    qemu.create(image, "qcow2", "4M")
    qemu.io(image, ["write -P 1 0 4M"])
    opened = await open_image(str(image), overlay=KeptOverlay(str(overlay)))
    await opened.write(5000, b"x" * 100_000)
    await opened.write_zeroes(MIB, MIB, unmap=True)
    await opened.aclose()
    shown = reference_bytes(overlay, "qcow2")
    qemu.must_run("qemu-img", "commit", "-q", overlay)
    assert reference_bytes(image, "qcow2") == shown
    assert shown[4999:105_001] == b"\1" + b"x" * 100_000 + b"\1"
    assert shown[MIB : 2 * MIB] == bytes(MIB)
    assert qemu.check(image).clean


@pytest.mark.parametrize(
    ("image", "overlay", "expected"),
    [
        ("disk.qcow2", "o.qcow2", "disk.qcow2"),
        ("in/disk.qcow2", "o.qcow2", "in/disk.qcow2"),
        ("disk.qcow2", "in/o.qcow2", "{folder}/disk.qcow2"),
        ("./in/../disk.qcow2", "o.qcow2", "disk.qcow2"),
        ("{folder}/disk.qcow2", "o.qcow2", "disk.qcow2"),
        ("link/disk.qcow2", "in/o.qcow2", "disk.qcow2"),
        ("with:colon.qcow2", "o.qcow2", "./with:colon.qcow2"),
    ],
)
async def test_how_an_overlay_names_the_image(
    image: str, overlay: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative where the image is in the overlay's folder or below, whole elsewhere; QEMU and we find it again."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to("in")
    image = image.replace("{folder}", str(tmp_path))
    qemu.create(tmp_path / image, "qcow2", "1M")
    for byte in b"12":
        opened = await open_image(image, overlay=KeptOverlay(overlay))
        await opened.write(byte, bytes([byte]))
        await opened.aclose()
    said = qemu.info(Path(overlay))
    assert said["backing-filename"] == expected.replace("{folder}", str(tmp_path))
    assert (said["backing-filename-format"], said["virtual-size"]) == ("qcow2", MIB)
    assert qemu.check(Path(overlay)).clean
    assert reference_bytes(Path(overlay), "qcow2")[48:52] == b"\x0012\x00"


async def refused(image: Path, overlay: Path, options: OpenOptions | None = None) -> str:
    """What is said where an overlay does not belong; nothing may change."""
    before = overlay.read_bytes()
    with pytest.raises(ImageUsageError) as caught:
        await open_image(str(image), options, overlay=KeptOverlay(str(overlay)))
    assert overlay.read_bytes() == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


async def test_what_does_not_belong_is_refused(tmp_path: Path) -> None:
    """Another image's overlay, one that is smaller, of another format, that is none at all, or part of the chain."""
    base, image, other = tmp_path / "base.qcow2", tmp_path / "disk.qcow2", tmp_path / "other.qcow2"
    qemu.create(base, "qcow2", "2M")
    qemu.create(image, "qcow2", "2M", backing="base.qcow2", backing_format="qcow2")
    qemu.create(other, "qcow2", "2M")

    def overlay(name: str, backing: str, size: str = "2M", backing_format: str = "qcow2") -> Path:
        qemu.create(tmp_path / name, "qcow2", size, backing=backing, backing_format=backing_format)
        return tmp_path / name

    assert "its backing file is other.qcow2" in await refused(image, overlay("a", "other.qcow2"))
    assert "no backing file" in await refused(image, other)
    assert "smaller" in await refused(image, overlay("b", "disk.qcow2", "1M"))
    assert f"takes {image} for raw" in await refused(image, overlay("c", "disk.qcow2", backing_format="raw"))
    assert "part of the chain" in await refused(image, base)
    assert "part of the chain" in await refused(image, image)
    (tmp_path / "d").write_bytes(b"text")
    assert "no QCOW image" in await refused(image, tmp_path / "d")
    qemu.must_run("qemu-img", "create", "-q", "-f", "qcow", "-b", "disk.qcow2", "-F", "qcow2", tmp_path / "e", "2M")
    assert "--backing-format qcow2" in await refused(image, tmp_path / "e")
    for options, name in ((OpenOptions(), "larger"), (OpenOptions(backing_format="qcow2"), "e")):
        if name == "larger":
            overlay(name, str(image), "3M")
        kept = KeptOverlay(str(tmp_path / name), unnamed_format=options.backing_format)
        opened = await open_image(str(image), options, overlay=kept)
        await opened.aclose()
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError):
        await open_image(str(image), OpenOptions(read_only=True), overlay=KeptOverlay(str(missing), writable=False))
    assert not missing.exists()


async def test_a_hard_link_and_a_copy(tmp_path: Path) -> None:
    """The same file by another name is the image; the same bytes in another file are not."""
    (tmp_path / "in").mkdir()
    image, overlay = tmp_path / "disk.qcow2", tmp_path / "o.qcow2"
    qemu.create(image, "qcow2", "1M")
    os.link(image, tmp_path / "in/linked.qcow2")
    shutil.copy(image, tmp_path / "in/copy.qcow2")
    await (await open_image(str(image), overlay=KeptOverlay(str(overlay)))).aclose()
    await (await open_image(str(tmp_path / "in/linked.qcow2"), overlay=KeptOverlay(str(overlay)))).aclose()
    assert "its backing file is disk.qcow2" in await refused(tmp_path / "in/copy.qcow2", overlay)


async def test_locks(tmp_path: Path) -> None:
    """The image is held by readers: QEMU reads it and does not write it. A kept overlay has one writer."""
    image, overlay = tmp_path / "disk.qcow2", tmp_path / "o.qcow2"
    qemu.create(image, "qcow2", "1M")
    opened = await open_image(str(image), overlay=KeptOverlay(str(overlay)))
    try:
        with pytest.raises(ImageLockedError, match=r"o\.qcow2"):
            await open_image(str(image), overlay=KeptOverlay(str(overlay)))
        with pytest.raises(ImageLockedError):
            await open_image(str(image))
        assert qemu.run("qemu-io", "-c", "write 0 512", image).code
        assert qemu.run("qemu-io", "-r", "-c", "read 0 512", image).code == 0
        assert qemu.run("qemu-io", "-c", "write 0 512", overlay).code
    finally:
        await opened.aclose()
    writer = await open_image(str(image))
    try:
        for taker in (KeptOverlay(str(overlay)), EphemeralOverlay()):
            with pytest.raises(ImageLockedError, match="open for writing"):
                await open_image(str(image), overlay=taker)
    finally:
        await writer.aclose()


@pytest.mark.parametrize("options", ["encrypt.format=luks,encrypt.iter-time=1,encrypt.cipher-alg=aes-128", "v1 aes"])
async def test_nothing_is_written_in_the_clear(options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over an encrypted image a kept overlay is encrypted with its passphrase and its cipher, a throw-away one with
    a key that nobody has; QEMU reads the kept one."""
    monkeypatch.setattr("qcowfuse.tools.overlay.Encryption", partial(Encryption, iter_time=1))
    image, overlay = tmp_path / "disk.qcow2", tmp_path / "o.qcow2"
    is_luks = options != "v1 aes"
    chosen = parse_create_options(
        "qcow2" if is_luks else "qcow", [options if is_luks else "encrypt.format=aes"], size="2M"
    )
    await create_image(str(image), chosen, passphrase=bytearray(PASSPHRASE))
    first = await open_image(str(image), WITH_KEY)
    await first.write(0, b"below" * 30_000)
    await first.aclose()
    secret = random.Random(1).randbytes(40_000)

    opened = await open_image(str(image), WITH_KEY, overlay=EphemeralOverlay())
    await opened.write(70_000, secret)
    await opened.flush()
    assert bytes(await opened.read(69_995, 40_005)) == b"below" + secret
    path = next(path for path in Path("/proc/self/fd").iterdir() if f"{tmp_path}/#" in os.readlink(path))
    stored = path.read_bytes()
    await opened.aclose()
    assert len(stored) > 40_000
    assert secret[:64] not in stored
    assert secret[-64:] not in stored

    opened = await open_image(str(image), WITH_KEY, overlay=KeptOverlay(str(overlay)))
    await opened.write(70_000, secret)
    await opened.aclose()
    assert secret[:64] not in overlay.read_bytes()
    said = qemu.info(overlay)
    details = said["format-specific"]["data"]["encrypt"]
    assert (details["format"], details["cipher-alg"]) == ("luks", "aes-128" if is_luks else "aes-256")
    below = "encrypt.key-secret=key,backing.encrypt.key-secret=key"
    image_options = f"driver=qcow2,file.filename={overlay},{below}"
    qemu.must_run("qemu-img", "check", *secret_arguments(), "--image-opts", image_options)
    shown = qemu.must_run(
        "qemu-io", *secret_arguments(), "-r", "--image-opts", "-c", "read -v 69995 8", image_options
    )
    assert (b"below" + secret[:3]).hex(" ") in shown
    with pytest.raises(WrongKeyError):
        await open_image(
            str(image), OpenOptions(passphrase=lambda _: bytearray(b"wrong")), overlay=KeptOverlay(str(overlay))
        )
    plain = tmp_path / "plain.qcow2"
    qemu.must_run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", image, "-F", said["backing-filename-format"],
                  plain, "2M")  # fmt: skip
    assert "is not encrypted" in await refused(image, plain, WITH_KEY)


async def test_an_encrypted_overlay_over_a_plain_image(tmp_path: Path) -> None:
    """One that the user has made is used, with its own passphrase."""
    image, overlay = tmp_path / "disk.qcow2", tmp_path / "o.qcow2"
    qemu.create(image, "qcow2", "1M")
    options = parse_create_options(
        "qcow2",
        ["encrypt.format=luks,encrypt.iter-time=1"],
        size=None,
        backing_file="disk.qcow2",
        backing_format="qcow2",
    )
    await create_image(str(overlay), options, passphrase=bytearray(PASSPHRASE))
    opened = await open_image(str(image), WITH_KEY, overlay=KeptOverlay(str(overlay)))
    await opened.write(0, b"plain text")
    await opened.aclose()
    assert b"plain text" not in overlay.read_bytes()
    with pytest.raises(ImageUsageError, match="needs a key"):
        await open_image(str(image), overlay=KeptOverlay(str(overlay)))


async def test_permissions_are_those_of_the_image(tmp_path: Path) -> None:
    """What is written may not be read by more than may read the image."""
    image = tmp_path / "disk.qcow2"
    qemu.create(image, "qcow2", "1M")
    for mode, expected in ((0o400, 0o600), (0o640, 0o640), (0o666, 0o644)):
        image.chmod(mode)
        overlay = tmp_path / f"{mode:o}.qcow2"
        await (await open_image(str(image), overlay=KeptOverlay(str(overlay)))).aclose()
        assert overlay.stat().st_mode & 0o777 == expected


@pytest.mark.parametrize("nameless", [True, False])
async def test_two_that_make_the_same_overlay(
    nameless: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who comes second uses what the first one made, and leaves nothing else behind."""
    image, overlay = tmp_path / "disk.qcow2", tmp_path / "o.qcow2"
    qemu.create(image, "qcow2", "1M")
    original = new_file.NewFile.publish

    async def late(file: new_file.NewFile) -> None:
        qemu.create(overlay, "qcow2", "1M", backing="disk.qcow2", backing_format="qcow2")
        qemu.io(overlay, ["write -P 9 0 512"])
        await original(file)

    monkeypatch.setattr(new_file.NewFile, "publish", late)
    if not nameless:
        monkeypatch.setattr(new_file, "open_nameless", lambda _: None)
    opened = await open_image(str(image), overlay=KeptOverlay(str(overlay)))
    assert bytes(await opened.read(0, 3)) == b"\x09\x09\x09"
    await opened.aclose()
    assert sorted(os.listdir(tmp_path)) == ["disk.qcow2", "o.qcow2"]


KILLED = """
import os, sys, trio
from qcowfuse.driver.chain import open_image
from qcowfuse.tools import new_file, overlay
nameless = sys.argv[1] == "True"
if not nameless:
    new_file.open_nameless = lambda path: None
n_calls = 0
def counted(name, wanted):
    original = getattr(os, name)
    def call(*args, **keywords):
        global n_calls
        n_calls += 1
        if n_calls == wanted:
            os.kill(os.getpid(), 9)
        return original(*args, **keywords)
    setattr(os, name, call)
async def run():
    await (await open_image("disk.qcow2", overlay=overlay.KeptOverlay("o.qcow2"))).aclose()
for number in range(1, 30):
    pid = os.fork()
    if not pid:
        for name in ("ftruncate", "pwritev", "fsync", "link", "unlink"):
            counted(name, number)
        trio.run(run)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    found = sorted(os.listdir())
    print(code, "o.qcow2" in found, len(found), flush=True)
    if "o.qcow2" in found:
        os.rename("o.qcow2", f"{number}.made")
    for name in found:
        if name.startswith("."):
            os.unlink(name)
    if not code:
        break
"""


@pytest.mark.parametrize("nameless", [True, False])
def test_killed_while_an_overlay_is_made(nameless: bool, tmp_path: Path) -> None:
    """Killed before each of its system calls: there is no overlay, or a whole one. Without a name until then, there
    is not even another file."""
    qemu.create(tmp_path / "disk.qcow2", "qcow2", "1M")
    said = subprocess.run(
        [sys.executable, "-c", KILLED, str(nameless)],
        cwd=tmp_path, env=environment(), check=True, capture_output=True, text=True,
    )  # fmt: skip
    ends = [tuple(line.split()) for line in said.stdout.splitlines()]
    assert [code for code, _, _ in ends] == ["-9"] * (len(ends) - 1) + ["0"]
    is_there = [made == "True" for _, made, _ in ends]
    assert is_there == sorted(is_there)
    assert is_there.count(False) >= 5
    made = list(tmp_path.glob("*.made"))
    assert len(made) == is_there.count(True) >= 2
    for overlay in made:
        assert qemu.check(overlay).clean
        assert qemu.info(overlay)["backing-filename"] == "disk.qcow2"
    n_others = [int(n_files) - 1 - has for (_, _, n_files), has in zip(ends, accumulated(is_there), strict=True)]
    assert any(n_others) != nameless


def accumulated(is_there: list[bool]) -> list[int]:
    """How many overlays there are after each of the runs, the renamed ones included."""
    return [sum(is_there[: number + 1]) for number in range(len(is_there))]


def test_the_order_of_making(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut needs: the file is durable before it has its name, and the folder after."""
    qemu.create(tmp_path / "disk.qcow2", "qcow2", "1M")
    calls: list[str] = []

    def recorded(name: str) -> None:
        original = getattr(os, name)

        def call(*args: object, **keywords: object) -> object:
            target = os.readlink(f"/proc/self/fd/{args[0]}") if isinstance(args[0], int) else ""
            calls.append(f"{name} {'folder' if target == str(tmp_path) else 'file'}")
            return original(*args, **keywords)

        monkeypatch.setattr(os, name, call)

    for name in ("pwritev", "fsync", "link"):
        recorded(name)
    options = ["backing_file=disk.qcow2,backing_fmt=qcow2"]
    assert main(["create", "-q", "-o", options[0], str(tmp_path / "o.qcow2")]) == 0
    assert calls[-3:] == ["fsync file", "link file", "fsync folder"]
    assert set(calls[:-3]) == {"pwritev file"}
