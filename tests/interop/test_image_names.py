"""Names inside images are no orders: which backing and data files are opened, and what else is not even touched."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcowfuse.cli.exit_codes import ExitCode, exit_code_of
from qcowfuse.cli.img.exit_codes import ImgExit
from qcowfuse.cli.img.main import main
from qcowfuse.driver.chain import open_image
from qcowfuse.driver.options import OpenOptions
from qcowfuse.errors import BackingChainError, ImageUsageError
from qcowfuse.storage import beneath
from tests.support import battery, qemu
from tests.support.matrix import KIB, MIB, Built, forget_backing_format
from tests.support.mutation import break_line

READ_ONLY = OpenOptions(read_only=True)
SECRET = b"a secret of the host".ljust(64 * KIB, b".")


@pytest.fixture
def place(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """``in/`` for the image, ``out/secret`` beside it; whatever happens, the secret and the descriptors stay."""
    (image_folder / "in").mkdir()
    (image_folder / "out").mkdir()
    (image_folder / "out/secret").write_bytes(SECRET)
    monkeypatch.chdir(image_folder)
    n_open = len(os.listdir("/proc/self/fd"))
    yield image_folder
    assert (image_folder / "out/secret").read_bytes() == SECRET
    assert len(os.listdir("/proc/self/fd")) == n_open


def overlay(place: Path, name: str | Path, *, format_name: str | None = "raw", kind: str = "qcow2") -> str:
    """An image of 1 MiB in ``in/`` that calls its backing file ``name``; its path."""
    path = place / "in/image"
    path.unlink(missing_ok=True)
    words = ["qemu-img", "create", "-q", "-u", "-f", kind, "-F", format_name or "raw", "-b", str(name), str(path)]
    qemu.must_run(*words, "1M")
    if format_name is None and kind == "qcow2":
        forget_backing_format(Built(path, "qcow2", MIB))
    return str(path)


def with_data_file(place: Path, name: str | Path, *, size: int = MIB, options: str = "") -> str:
    """An image in ``in/`` that calls its data file ``name``, which is as it was before; its path."""
    path, data = place / "in/image", place / "in" / name
    path.unlink(missing_ok=True)
    before = data.read_bytes() if data.is_file() else None
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={name}{options}", path.name, str(size)]
    qemu.must_run(*words, cwd=path.parent)
    if before is not None:
        data.write_bytes(before)
    return str(path)


async def start_of(path: str, options: OpenOptions = READ_ONLY) -> bytes:
    """The first bytes of the disk."""
    image = await open_image(path, options)
    try:
        return bytes(await battery.read(image, 0, 8))
    finally:
        await image.aclose()


async def refusal_of(path: str, options: OpenOptions = READ_ONLY) -> str:
    """How opening is refused: one line, with the exit code of images that cannot be served."""
    with pytest.raises(BackingChainError) as raised:
        await open_image(path, options)
    assert exit_code_of(raised.value) is ExitCode.IMAGE
    text = str(raised.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", ["{out}/secret", "../out/secret", "link", "folder/secret", "file:{out}/secret"])
@pytest.mark.parametrize("what", ["backing file", "data file"])
async def test_a_name_that_leads_out_is_refused(what: str, name: str, place: Path) -> None:
    """Absolute, by dots, by a link: refused with the names of both files and the option that allows it, nothing is
    locked or read meanwhile; with that option it is opened."""
    os.symlink(place / "out/secret", place / "in/link")
    os.symlink("../out", place / "in/folder")
    name = name.replace("{out}", str(place / "out"))
    if what == "data file":
        path = with_data_file(place, name.removeprefix("file:"), size=64 * KIB, options=",data_file_raw=on")
    else:
        path = overlay(place, name)
    with (place / "out/secret").open("r+b") as secret:
        fcntl.lockf(secret, fcntl.LOCK_EX | fcntl.LOCK_NB)  # whatever touched it by a lock of its own would fail
        line = await refusal_of(path)
    assert f"names {what} " in line
    assert name.removeprefix("file:") in line
    assert f"--allow-dir {place}/out allows it" in line
    assert await start_of(path, OpenOptions(read_only=True, allow_dirs=(str(place / "out"),))) == SECRET[:8]


async def test_a_file_beneath_needs_no_option(place: Path) -> None:
    """Beside the image, below it, by a link that stays there, by its absolute name."""
    (place / "in/bases").mkdir()
    (place / "in/bases/base").write_bytes(SECRET)
    os.symlink("bases/base", place / "in/link")
    for name in ("bases/base", "link", "file:bases/base", place / "in/bases/base"):
        assert await start_of(overlay(place, name)) == SECRET[:8]


async def test_each_layer_has_its_own_folder(place: Path) -> None:
    """A layer in a folder below names files from there on, and none above, though the image could."""
    (place / "in/below").mkdir()
    (place / "in/base").write_bytes(SECRET)
    (place / "in/below/base").write_bytes(SECRET[::-1])
    for name in ("base", "../base"):
        path = overlay(place, name)
        os.replace(path, place / "in/below/middle")
        top = overlay(place, "below/middle", format_name="qcow2")
        if name == "base":
            assert await start_of(top) == SECRET[:-9:-1]
            continue
        with pytest.raises(BackingChainError, match=r"below/middle: names backing file \.\./base .*outside"):
            await open_image(top, READ_ONLY)
        assert await start_of(top, OpenOptions(read_only=True, allow_dirs=(str(place / "in"),))) == SECRET[:8]


@pytest.mark.parametrize("format_name", [None, "raw"])
@pytest.mark.parametrize("kind", ["qcow2", "qcow"])
async def test_what_is_no_file_is_not_opened(kind: str, format_name: str | None, place: Path) -> None:
    """A FIFO in the folder makes nobody wait, with a format and without; not even where its folder is allowed."""
    os.mkfifo(place / "in/fifo")
    path = overlay(place, "fifo", format_name=format_name, kind=kind)
    for options in (READ_ONLY, OpenOptions(), OpenOptions(allow_dirs=(str(place), "/"))):
        assert "names backing file fifo, which is a FIFO" in await refusal_of(path, options)


@pytest.mark.parametrize("name", ["/proc/self/environ", "/proc/self/mem", "/dev/tty", "/dev/null"])
async def test_files_of_the_system_are_never_opened(name: str, place: Path) -> None:
    """Neither by name, nor by a link, nor where all is allowed."""
    os.symlink(name, place / "in/link")
    for given in (name, "link"):
        path = overlay(place, given)
        await refusal_of(path)
        assert "which is a" in await refusal_of(path, OpenOptions(read_only=True, allow_dirs=("/",)))


async def test_no_backing_refuses_all_names(place: Path) -> None:
    """Even those in the folder; what the user names instead is not meant, nor an image that stands alone."""
    (place / "in/base").write_bytes(SECRET)
    alone = OpenOptions(read_only=True, no_backing=True)
    assert "--no-backing" in await refusal_of(overlay(place, "base"), alone)
    path = with_data_file(place, "base", size=64 * KIB, options=",data_file_raw=on")
    assert "--no-backing" in await refusal_of(path, alone)
    assert await start_of(path, alone._replace(data_file=str(place / "out/secret"))) == SECRET[:8]
    qemu.create(place / "in/alone", "qcow2", MIB)
    assert await start_of(str(place / "in/alone"), alone) == bytes(8)


async def test_the_user_names_another_backing_file(place: Path) -> None:
    """The user's own choice, a link to wherever it leads; the names inside of it are judged from its folder."""
    path = overlay(place, "missing")
    os.symlink(place / "out/secret", place / "chosen")
    assert await start_of(path, OpenOptions(backing_file=str(place / "chosen"))) == SECRET[:8]
    (place / "in/base").write_bytes(SECRET[::-1])
    os.replace(overlay(place, "base"), place / "in/middle")
    (place / "out/base").write_bytes(SECRET[::-1])
    os.replace(place / "in/middle", place / "out/middle")
    path = overlay(place, "missing", format_name="qcow2")
    assert await start_of(path, OpenOptions(backing_file="out/middle")) == SECRET[:-9:-1]
    with pytest.raises(BackingChainError, match="is part of the chain already"):
        await open_image(path, OpenOptions(read_only=True, backing_file="in/image"))
    with pytest.raises(BackingChainError, match="cannot open its backing file nowhere: No such file"):
        await open_image(path, OpenOptions(backing_file="nowhere"))
    qemu.create(place / "in/alone", "qcow2", MIB)
    with pytest.raises(ImageUsageError, match="has no backing file"):
        await open_image(str(place / "in/alone"), OpenOptions(backing_file="chosen"))


@pytest.mark.root
async def test_a_data_file_of_another_owner_is_not_written(place: Path) -> None:
    """It is read, and written only where the user names it: anyone may put an image beside the files of others."""
    (place / "in/data").write_bytes(SECRET)
    path = with_data_file(place, "data", size=64 * KIB, options=",data_file_raw=on")
    os.chown(place / "in/data", 4321, 4321)
    assert await start_of(path) == SECRET[:8]
    assert "belongs to user 4321, the image to user 0" in await refusal_of(path, OpenOptions())
    assert await start_of(path, OpenOptions(data_file=str(place / "in/data"))) == SECRET[:8]
    os.chown(path, 4321, 4321)
    assert await start_of(path, OpenOptions()) == SECRET[:8]


async def test_a_version_1_overlay_takes_its_backing_file_for_raw(place: Path) -> None:
    """Version 1 knows no formats, and what a guest has written into a raw disk is never probed; the user can say
    what it is, or that the content shall decide."""
    inner = place / "in/inner"
    os.replace(overlay(place, place / "out/secret"), inner)
    path = overlay(place, "inner", kind="qcow")
    assert "--backing-format qcow2, or raw" in await refusal_of(path)
    assert await start_of(path, OpenOptions(read_only=True, backing_format="raw")) == inner.read_bytes()[:8]
    allowed = OpenOptions(read_only=True, allow_dirs=(str(place / "out"),))
    for format_name in ("qcow2", "auto"):
        assert await start_of(path, allowed._replace(backing_format=format_name)) == SECRET[:8]
    inner.write_bytes(SECRET)
    for any_format in (None, "raw", "auto"):
        assert await start_of(path, OpenOptions(backing_format=any_format)) == SECRET[:8]


async def test_a_file_that_is_replaced_stays_the_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was judged is what is opened, even if a link to something else has taken its name in between."""
    base = place / "in/base"

    def judge_and_replace(*given: object, **named: object) -> None:
        judge(*given, **named)  # type: ignore[arg-type]
        base.unlink()
        os.symlink(place / "out/secret", base)

    judge = beneath.refuse_unfit
    monkeypatch.setattr(beneath, "refuse_unfit", judge_and_replace)
    base.write_bytes(SECRET[::-1])
    assert await start_of(overlay(place, "base")) == SECRET[:-9:-1]
    base.unlink()
    base.write_bytes(SECRET[::-1])
    by_name = 'f"/proc/self/fd/{self.fd}"', "self.path"
    break_line(monkeypatch, beneath.FoundFile, "open", *by_name)
    assert await start_of(overlay(place, "base")) == SECRET[:8], "the test would not notice a second look-up"


def test_the_same_rules_in_every_command(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """info shows names and opens nothing; map and resize refuse in one line what the mount refuses, and take the same
    options; check and snapshot open the image alone."""
    path = overlay(place, place / "out/secret")
    assert main(["info", path]) == ImgExit.OK
    assert f"backing file: {place}/out/secret" in capsys.readouterr().out
    for words in (["check"], ["snapshot", "-c", "one"]):
        assert main([*words, path]) == ImgExit.OK
    capsys.readouterr()
    for words in (["map", path], ["resize", path, "+1M"]):
        assert main(words) == ImgExit.FAILED
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert f"--allow-dir {place}/out allows it" in line
        assert main([*words, "--no-backing"]) == ImgExit.FAILED
        assert "--no-backing refuses" in capsys.readouterr().err
        for option in (f"--allow-dir={place}/out", f"--backing-file={place}/out/secret"):
            assert main([*words, option]) == ImgExit.OK, capsys.readouterr().err
            assert main([*words, "--no-backing", option]) == ImgExit.FAILED
            assert "exclude each other" in capsys.readouterr().err
    assert main(["map", path, "--backing-format", "vmdk"]) == ImgExit.FAILED
    assert "not one of raw, qcow2 and auto" in capsys.readouterr().err
