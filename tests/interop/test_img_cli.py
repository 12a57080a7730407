"""qcowfuse-img as a person meets it: text output, locks, failures in one line, help."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio

from qcowfuse.cli.img import main
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
