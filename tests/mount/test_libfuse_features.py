"""What a mount has beyond pyfuse3's public interface, told by the mount itself, and what is left where that fails."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.mounting import Mounted, check_image_file, create_image

pytestmark = [pytest.mark.mount, pytest.mark.root]

ALL = {
    *("tuned_init", "writeback_cache", "fallocate", "lseek", "copy_file_range", "killpriv"),
    *("request_wait", "direct_requests"),
}
NO_CALLBACKS = """
import ctypes
import qcowfuse.cli.mount.serving
import qcowfuse.storage.file  # which calls io_uring by such a type, and makes no callbacks

def no_memory(*arguments, **named):
    raise MemoryError
ctypes.CFUNCTYPE = no_memory
"""
NOTHING_EXECUTABLE = """
from tests.support.executable_memory import forbid
forbid()
"""
LSEEK_GAINED = """
from qcowfuse.fuse.libfuse import operations_table
init = operations_table.TableCopy.__init__

def with_lseek(self, address, n_bytes):
    table = operations_table.OperationsTable.from_address(address)
    table.lseek = table.read
    init(self, address, n_bytes)
operations_table.TableCopy.__init__ = with_lseek
"""
NO_LSEEK = """
from qcowfuse.fuse.libfuse.extra_operations import ExtraOperations

def missing(*arguments):
    raise AttributeError('undefined symbol: fuse_reply_lseek')
ExtraOperations.lseek_callback = missing
"""
NO_WAIT = """
from qcowfuse.fuse.libfuse import extended_session

def missing(gate):
    raise AttributeError('no trio')
extended_session.divert_waits = missing
"""


def features(mount: Mounted) -> set[str]:
    """What the extended attributes say is there."""
    prefix = "user.qcowfuse.libfuse."
    names = [name for name in os.listxattr(mount.file) if name.startswith(prefix)]
    assert {name.removeprefix(prefix) for name in names} == {*ALL, "version"}
    assert int(os.getxattr(mount.file, prefix + "version")) >= 300
    return {name.removeprefix(prefix) for name in names if os.getxattr(mount.file, name) == b"1"}


def can_discard(file: Path) -> bool:
    """Punch a hole and see zeroes."""
    done = subprocess.run(["fallocate", "-p", "-o", "1M", "-l", "64K", file], capture_output=True, check=False)
    with file.open("rb") as stream:
        stream.seek(1 << 20)
        return not done.returncode and not any(stream.read(65536))


def shows_holes(file: Path) -> bool:
    """Whether the end of the data, 4 MiB, is a hole."""
    with file.open("rb") as stream:
        return os.lseek(stream.fileno(), 2 << 20, os.SEEK_HOLE) == 4 << 20


@pytest.mark.parametrize(
    ("patch", "lacks"),
    [
        pytest.param("", set(), id="as it is"),
        pytest.param(LSEEK_GAINED, set(), id="pyfuse3 has lseek"),
        pytest.param(NO_LSEEK, {"lseek"}, id="no lseek"),
        pytest.param(NO_WAIT, {"request_wait", "direct_requests"}, id="no wait"),
        pytest.param(NO_CALLBACKS, ALL - {"request_wait", "direct_requests"}, id="no callbacks"),
        pytest.param(NOTHING_EXECUTABLE, ALL - {"request_wait"}, id="nothing executable"),
    ],
)
def test_a_mount_says_what_it_has(tmp_path: Path, patch: str, lacks: set[str]) -> None:
    """It serves whatever is lacking, has what it says that it has, and says with -d why it lacks the rest."""
    image = create_image(tmp_path / "image")
    (tmp_path / "mnt").mkdir()
    data = os.urandom(4 << 20)
    with Mounted(image, tmp_path / "mnt", "-d", patch=patch) as mount:
        assert features(mount) == ALL - lacks
        with mount.file.open("r+b") as stream:
            stream.write(data)
            os.fsync(stream.fileno())
        assert mount.file.read_bytes()[: 4 << 20] == data
        assert shows_holes(mount.file) is ("lseek" not in lacks)
        assert can_discard(mount.file) is ("fallocate" not in lacks)
        mount.close()
        (state,) = [line for line in mount.log.splitlines() if "libfuse 3." in line]
        assert all(f"no {feature}: " in state for feature in lacks)
        assert state.count("; no ") == len(lacks)
        assert "Traceback" not in mount.log
        assert mount.log.count("not tuned") == ("tuned_init" in lacks)
    check_image_file(image)
