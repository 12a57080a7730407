"""The one filter between names from images and a terminal or a log, and that nothing goes around it."""

from __future__ import annotations

import ast
import json
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qcowfuse.cli.exit_codes import ExitCode
from qcowfuse.cli.img.exit_codes import ImgExit
from qcowfuse.cli.img.main import main
from qcowfuse.cli.json_text import as_unicode
from qcowfuse.cli.logs import OneLine
from qcowfuse.format.extensions import EXTENSION_DATA_FILE, HeaderExtension
from qcowfuse.format.header import Qcow2Header
from qcowfuse.format.header_bytes import serialise_header
from qcowfuse.format.header_parsing import parse_header
from qcowfuse.printable import printable
from tests.support.sources import nodes

PACKAGE = Path(__file__).parents[2] / "qcowfuse"
EVIL = "x\x1b[2Jy\nforged by a name\r\x9b31m\u202etxt\u2028z\udcff"
SHOWN = "x?[2Jy?forged by a name??31m?txt?z?"


def test_what_is_let_through() -> None:
    """Text of any script, and nothing that begins a line, speaks to a terminal or turns text around."""
    assert printable(EVIL) == SHOWN
    plain = "Größe 大小 حجم disk one.qcow2 🙂"
    assert printable(plain) is plain
    for code in (
        *range(0x20),
        *range(0x7F, 0xA0),
        0xAD,
        0x200B,
        0x200E,
        *range(0x202A, 0x202F),
        0x2066,
        0x2028,
        0xFEFF,
    ):
        assert printable(f"a{chr(code)}b") == "a?b", hex(code)


def test_a_record_is_one_line() -> None:
    """Whatever is in the message; a traceback comes in lines that cannot be taken for records."""
    formatter = OneLine("qcowfuse: %(levelname)s: %(message)s")
    record = logging.LogRecord("qcowfuse", logging.ERROR, __file__, 1, "a name: %s", (EVIL,), None)
    assert formatter.format(record) == f"qcowfuse: ERROR: a name: {SHOWN}"
    try:
        raise ValueError(EVIL)
    except ValueError:
        record.exc_info = sys.exc_info()
    first, *others = formatter.format(record).split("\n")
    assert first == f"qcowfuse: ERROR: a name: {SHOWN}"
    assert len(others) > 2
    assert all(line.startswith("  ") and line.isprintable() for line in others)


def test_there_is_no_other_filter() -> None:
    """No module but the one looks at single characters, and no log has another formatter."""
    texts = ((path, path.read_text()) for path in PACKAGE.rglob("*.py"))
    for path in (path for path, text in texts if "isprintable" in text or "Formatter" in text):
        called = [node.func for node in nodes(path) if isinstance(node, ast.Call)]
        names = {func.attr for func in called if isinstance(func, ast.Attribute)}
        assert path.name == "printable.py" or "isprintable" not in names, path
        assert "Formatter" not in names, path


def with_names(folder: Path, *, data_name: str | None = None, backing_name: str | None = None) -> Path:
    """An image whose data file, or backing file, is called so. It has a data cluster, which lies nowhere."""
    path = folder / "image.qcow2"
    path.unlink(missing_ok=True)
    words = ["create", "-q", "-o", "preallocation=metadata"]
    words += [] if data_name is None else ["-o", "data_file=data"]
    assert main([*words, str(path), "1M"]) == ImgExit.OK
    (folder / "data").unlink(missing_ok=True)
    start = path.read_bytes()[:65536]
    header = parse_header(start, path.stat().st_size)
    assert isinstance(header, Qcow2Header)
    others = tuple(extension for extension in header.extensions if extension.magic != EXTENSION_DATA_FILE)
    if data_name is not None:
        others = (HeaderExtension(EXTENSION_DATA_FILE, os.fsencode(data_name)), *others)
    header = header._replace(extensions=others)
    if backing_name is not None:
        place = len(serialise_header(header))
        header = header._replace(
            backing_file=backing_name, backing_file_offset=place, backing_file_size=len(os.fsencode(backing_name))
        )
    with path.open("r+b") as file:
        file.write(serialise_header(header).ljust(65536, b"\0"))
    return path


def is_clean(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n")) and "\nforged" not in text


@pytest.mark.parametrize("kind", ["data_name", "backing_name"])
@pytest.mark.parametrize("what", ["missing", "outside", "fifo"])
def test_every_command_shows_names_in_one_line(
    what: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is missing, lies outside or is none; in messages, listings and maps; in JSON it is escaped."""
    name = "../" + EVIL if what == "outside" else EVIL
    if what == "fifo":
        os.mkfifo(tmp_path / name)
    path = str(with_names(tmp_path, **{kind: name}))
    for words in (["info"], ["map"], ["resize"], ["check"], ["snapshot", "-l"], ["map", "--no-backing"]):
        code = main([*words, path, *(["+1M"] if words[0] == "resize" else [])])
        said = capsys.readouterr()
        assert is_clean(said.out), words
        assert is_clean(said.err), words
        assert said.err.count("\n") == (code == ImgExit.FAILED), said.err
        assert (SHOWN in said.out + said.err) == (words[0] in ("info", "map", "resize"))
    assert main(["info", "--output=json", path]) == ImgExit.OK
    said = capsys.readouterr()
    assert said.out.isascii()
    assert "\x1b" not in said.out
    found = json.loads(said.out)
    assert as_unicode(name) in (found.get("backing-filename"), found["format-specific"]["data"].get("data-file"))


def run(folder: Path, program: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own, with handlers of its own."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys; from qcowfuse.cli.{program}.main import main; sys.exit(main())", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        errors="surrogateescape",
        check=False,
        timeout=60,
    )


def test_warnings_are_one_line(tmp_path: Path) -> None:
    """What the driver logs while a command runs: here, that a data file has lost its end."""
    path = with_names(tmp_path, data_name=EVIL)
    (tmp_path / EVIL).touch()
    done = run(tmp_path, "img", "map", str(path))
    assert done.returncode == ImgExit.OK
    assert done.stderr.startswith("qcowfuse-img: WARNING: ")
    assert SHOWN in done.stderr
    assert done.stderr.count("\n") == 1
    assert is_clean(done.stderr)


def test_the_daemon_says_it_in_one_line(tmp_path: Path) -> None:
    """Before it serves, in its log and with all the details of --debug."""
    (tmp_path / "mnt").mkdir()
    runs = []
    for number, (name, words) in enumerate(
        ((EVIL, []), (EVIL, ["-d"]), ("../" + EVIL, []), ("../" + EVIL, ["--log-file", "log", "-f"]))
    ):
        (folder := tmp_path / str(number)).mkdir()
        runs.append(["mount", *words, str(with_names(folder, data_name=name)), str(tmp_path / "mnt")])
    with ThreadPoolExecutor(len(runs)) as pool:
        ended = list(pool.map(lambda words: run(tmp_path, *words), runs))
    for done in ended:
        assert done.returncode == ExitCode.IMAGE, done.stderr
        assert SHOWN in done.stderr
        assert is_clean(done.stderr)
    log = (tmp_path / "log").read_text(errors="surrogateescape")
    assert SHOWN in log
    assert is_clean(log)
