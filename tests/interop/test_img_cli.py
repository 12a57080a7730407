"""qcowfuse-img as a person meets it: text output, locks, failures in one line, help."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio

from qcowfuse.cli.img.main import main
from qcowfuse.driver.chain import open_image
from tests.support import qemu


@pytest.fixture
def image(image_folder: Path) -> Path:
    """An image with a snapshot, a bitmap and a backing file."""
    path = image_folder / "disk.qcow2"
    qemu.create(image_folder / "base.raw", "raw", "1M")
    qemu.create(path, "qcow2", "4M", backing="base.raw", backing_format="raw")
    qemu.io(path, ["write -P 5 0 300k", "write -z 1M 64k"])
    qemu.must_run("qemu-img", "snapshot", "-c", "before", path)
    qemu.must_run("qemu-img", "bitmap", "--add", path, "nightly")
    return path


def test_text_names_everything(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """info, map and check print text with sizes, backing file, snapshot, bitmap, extents and the verdict."""
    assert main(["info", str(image)]) == 0
    said = capsys.readouterr().out
    for text in ("virtual size: 4 MiB (4194304 bytes)", "backing file: base.raw", "before", "nightly", "compat: 1.1"):
        assert text in said
    assert main(["map", str(image)]) == 0
    kinds = [line.split()[2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert kinds == ["data", "zero", "zero", "unallocated"]
    assert main(["check", str(image)]) == 0
    captured = capsys.readouterr()
    assert "No errors were found" in captured.out
    assert captured.err == ""


def test_leaks_are_listed(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A leaked cluster is named on standard error, summed up on standard output, and the exit code is 3."""
    with image.open("r+b") as file:
        data = file.read()
        block = int.from_bytes(data[65536:65544], "big")
        file.seek(block + 2 * (len(data) // 65536 - 1))
        file.write(b"\0\5")
    assert main(["check", str(image)]) == qemu.check(image).code == 3
    captured = capsys.readouterr()
    assert "Leaked cluster" in captured.err
    assert "1 leaked clusters" in captured.out


async def test_an_image_in_use_needs_force_share(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """While a writer holds the image, info is refused in one line, and works with -U."""
    held = await open_image(str(image))
    try:
        assert await trio.to_thread.run_sync(main, ["info", str(image)]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert "writing" in captured.err
        assert await trio.to_thread.run_sync(main, ["info", "-U", "--output=json", str(image)]) == 0
        assert json.loads(capsys.readouterr().out)["virtual-size"] == 4 << 20
    finally:
        await held.aclose()


@pytest.mark.parametrize("command", ["info", "map", "check"])
@pytest.mark.parametrize("content", [None, b"", b"no image at all", b"QFI\xfb\0\0\0\x09" + bytes(600)])
def test_failures_are_one_line(
    command: str, content: bytes | None, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is no image, or is not there, is exit code 1 and one line that names it."""
    path = image_folder / "thing"
    if content is not None:
        path.write_bytes(content)
    assert main([command, str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert str(path) in captured.err


def test_help_names_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    """--help documents every exit code; wrong arguments are 1, not 2, which means corruptions."""
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {code:2}  " in said for code in (0, 1, 2, 3, 63))
    assert main(["check"]) == 1


def test_repair_says_what_it_did(image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """check -r prints what was repaired and the outcome of a second check, in text and JSON; -q says nothing."""
    # No bitmap: repairing an image that has one, QEMU 10 loses its snapshots (it writes the header without them).
    image = image_folder / "image.qcow2"
    qemu.create(image, "qcow2", "4M")
    qemu.io(image, ["write -P 5 0 300k", "write -z 1M 64k"])
    qemu.must_run("qemu-img", "snapshot", "-c", "before", image)
    with image.open("r+b") as file:
        data = file.read()
        block = int.from_bytes(data[65536:65544], "big")
        file.seek(block + 2 * (len(data) // 65536 - 1))
        file.write(b"\0\5")
    copies = [image.with_name(f"copy{number}") for number in range(3)]
    for copy in copies:
        copy.write_bytes(image.read_bytes())
    assert main(["check", "-r", "leaks", str(image)]) == 0
    said = capsys.readouterr()
    assert "Repaired: 1 leaked clusters, 0 errors" in said.out
    assert "No errors were found" in said.out
    assert main(["check", "--repair", "all", "--output=json", str(copies[0])]) == 0
    ours = json.loads(capsys.readouterr().out)
    theirs = json.loads(qemu.must_run("qemu-img", "check", "-r", "all", "--output=json", copies[1]))
    assert ours.pop("filename") != theirs.pop("filename")
    assert ours == theirs
    assert main(["check", "-q", "-r", "all", str(copies[2])]) == 0
    assert capsys.readouterr() == ("", "")
    assert qemu.check(image).clean


async def test_repair_needs_the_image_for_itself(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """check -r is refused with -U, and while another process serves the image."""
    assert main(["check", "-r", "all", "-U", str(image)]) == 1
    held = await open_image(str(image))
    try:
        assert await trio.to_thread.run_sync(main, ["check", "-r", "all", str(image)]) == 1
        assert capsys.readouterr().err.count("\n") == 2
    finally:
        await held.aclose()


def test_version_1_knows_no_checks(image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Version 1 is exit code 63 as with qemu-img, with and without -r."""
    path = image_folder / "old.qcow"
    qemu.create(path, "qcow", "1M")
    for words in ([], ["-r", "all"]):
        assert main(["check", *words, str(path)]) == 63
        assert "does not support checks" in capsys.readouterr().err
        assert qemu.run("qemu-img", "check", *words, path).code == 63


@pytest.mark.parametrize("command", ["map", "resize"])
def test_what_the_image_does_not_say(command: str, image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A backing file without a format, and a data file that is elsewhere: the message names the option that helps."""
    base, overlay = image_folder / "base.qcow2", image_folder / "overlay.qcow2"
    qemu.create(base, "qcow2", "4M")
    qemu.io(base, ["write -P 7 0 1M"])
    qemu.create(overlay, "qcow2", "4M", backing="base.qcow2", backing_format="qcow2")
    overlay.write_bytes(
        overlay.read_bytes().replace(bytes.fromhex("e2792aca00000005"), bytes.fromhex("e2792acb00000005"))
    )
    image, data = image_folder / "disk.qcow2", image_folder / "data.raw"
    qemu.create(image, "qcow2", "4M", options=f"data_file={data}")
    data.rename(image_folder / "elsewhere.raw")
    after = ["+1M"] if command == "resize" else ["--output=json"]
    assert main([command, str(overlay), *after]) == 1
    assert "--backing-format qcow2" in capsys.readouterr().err
    assert main([command, "--backing-format", "qcow2", str(overlay), *after]) == 0
    said = capsys.readouterr().out
    if command == "map":
        assert json.loads(said) == qemu.map_extents(overlay)
    assert main([command, str(image), *after]) == 1
    assert "--data-file PATH" in capsys.readouterr().err
    assert main([command, "--data-file", str(image_folder / "elsewhere.raw"), str(image), *after]) == 0
