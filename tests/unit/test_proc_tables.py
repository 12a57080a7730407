"""What is read of the kernel's tables, with names in them that others have chosen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from qcowfuse.daemon.record import user_of
from qcowfuse.system.mountinfo import mount_table
from tests.support.mounting import environment

PR_SET_NAME = 15


def test_a_line_of_the_table_of_mounts_ends_with_a_newline_alone(tmp_path: Path) -> None:
    """The kernel escapes a newline in a name, but not what else may end a line of text. In a source it does ``#``."""
    (tmp_path / "mountinfo").write_bytes(
        b"29 1 0:7 / /a\rb\\012c\\040d\xe2\x80\xa8\x0b\x85 rw - fuse.qcowfuse /i\\043\\134040 rw,user_id=0\n"
        b"30 1 0:8 / /empty rw - tmpfs  rw\n"
    )
    first, second = mount_table(f"self/root{tmp_path}")
    assert os.fsencode(first.path) == b"/a\rb\nc d\xe2\x80\xa8\x0b\x85"
    assert first.source == "/i#\\040"
    assert (second.path, second.source) == ("/empty", "")


def test_a_process_cannot_say_whose_it_is() -> None:
    """By its name, which stands in the same table as its user."""
    script = (
        f"import ctypes; ctypes.CDLL(None).prctl({PR_SET_NAME}, bytes.fromhex('780d5569643a0937')); print(input())"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdin is not None
        name = Path(f"/proc/{process.pid}/comm")
        while b"\r" not in name.read_bytes():
            assert process.poll() is None
        assert user_of(process.pid) == os.getuid()
        process.stdin.write("\n")
