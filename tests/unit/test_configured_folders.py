"""The administrator's list of folders: what counts, what is warned of, and what is ignored as a whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qcowfuse.cli.image_names import CONFIGURATION, configured_folders
from qcowfuse.cli.mount.arguments import parse_arguments


def folders_in(path: Path, text: str = "allow-dir = /bases\n") -> tuple[str, ...]:
    path.write_text(text)
    path.chmod(0o644)  # whatever the umask: many users have 002
    return configured_folders(str(path), owner=os.geteuid())


def test_the_lines_that_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each allow-dir is one folder; spaces around it and comments mean nothing; all else is warned of."""
    text = "# bases\n\nallow-dir = /bases\nallow-dir=/more bases \n  allow-dir  =  /x=y\n"
    assert folders_in(tmp_path / "conf", text) == ("/bases", "/more bases", "/x=y")
    assert not caplog.records
    assert folders_in(tmp_path / "conf", "allow-dir = /a\u2028b\x0bc\r\n") == ("/a\u2028b\x0bc",)
    bad = "allow-dir = relative\nallow_dirs = /a\nallow-dir\nallow-dir = /b"
    assert folders_in(tmp_path / "conf", bad) == ("/b",)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 3
    for number, warning in enumerate(warnings, 1):
        assert f"line {number} " in warning


def test_a_file_of_anyone_else_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Writable by its group or by all, or owned by somebody else: nothing in it counts, and a warning says so."""
    path = tmp_path / "conf"
    assert folders_in(path) == ("/bases",)
    assert configured_folders(str(path), owner=os.geteuid() + 1) == ()
    for mode in (0o664, 0o646, 0o666):
        path.chmod(mode)
        assert configured_folders(str(path), owner=os.geteuid()) == ()
    assert len(caplog.records) == 4
    assert all("ignored" in record.getMessage() for record in caplog.records)


def test_what_is_no_file_keeps_nobody_waiting(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A missing file is the usual case; a FIFO in its place is ignored."""
    assert configured_folders(str(tmp_path / "missing")) == ()
    assert not caplog.records
    os.mkfifo(tmp_path / "fifo")
    assert configured_folders(str(tmp_path / "fifo"), owner=os.geteuid()) == ()
    assert caplog.records


def test_it_widens_what_the_command_line_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders come after those of the command line; the file is the one that the manual names."""
    assert CONFIGURATION == "/etc/qcowfuse/qcowfuse.conf"
    monkeypatch.setattr("qcowfuse.cli.mount.arguments.configured_folders", lambda: ("/bases",))
    assert parse_arguments(["image", "mount"]).open_options.allow_dirs == ("/bases",)
    assert parse_arguments(["--allow-dir", "/a", "image", "mount"]).open_options.allow_dirs == ("/a", "/bases")
