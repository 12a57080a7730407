"""What a Debian package is made of; scripts/package try installs and uses whole packages."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qcowfuse import __version__
from qcowfuse.cli.image_names import configured_folders
from tests.support.mounting import REPOSITORY, environment

PACKAGING = REPOSITORY / "packaging"
IMAGE, POINT = "/images/a disk.qcow2", "/srv/a disk"


@pytest.fixture(name="deb")
def packagelib_deb(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that makes Debian packages."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    return importlib.import_module("packagelib.deb")


def test_packages_agree(deb: ModuleType) -> None:
    """The version is that of the program, and the container installs what the script asks for."""
    assert deb.version() == __version__
    recipe = (REPOSITORY / "Containerfile").read_text().replace("\\\n", "")
    first = re.findall(r"--no-install-recommends install (.*)", recipe)[0]
    assert first.split() == list(deb.BUILD_PACKAGES)


def test_files_have_the_time_of_the_source(deb: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the last commit, not of its checkout; without a repository of the changelog."""
    changelog = tmp_path / "CHANGELOG.md"
    changelog.write_text("")
    os.utime(changelog, (1_700_000_000, 1_700_000_000))
    monkeypatch.setattr(deb, "REPOSITORY", tmp_path)
    assert deb.source_time() == 1_700_000_000
    git = tmp_path / "git"  # a machine on which nothing is developed has none
    git.write_text(f'#!/bin/sh\n[ "$*" = "-C {tmp_path} log -1 --format=%ct" ] && echo 1600000000\n')
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert deb.source_time() == 1_600_000_000


def test_the_configuration_that_comes_with_it_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All of it is comment, and is taken without a warning."""
    copy = tmp_path / "qcowfuse.conf"
    copy.write_text((PACKAGING / "qcowfuse.conf").read_text())
    copy.chmod(0o644)
    assert configured_folders(str(copy), owner=os.getuid()) == ()
    assert not caplog.records
    copy.write_text(copy.read_text().replace("# allow-dir", "allow-dir"))
    assert configured_folders(str(copy), owner=os.getuid()) == ("/var/lib/images/bases",)


@pytest.mark.parametrize("name", ["postinst", "prerm", "postrm", "mount.qcowfuse"])
def test_scripts_parse(name: str) -> None:
    """By sh, and they may be run."""
    assert os.access(PACKAGING / name, os.X_OK)
    subprocess.run(["sh", "-n", PACKAGING / name], check=True)


@pytest.mark.parametrize(
    ("given", "code", "expected"),
    [
        ((), 0, ("--", IMAGE, POINT)),
        (("-o", "ro,nosuid"), 0, ("-o", "ro,nosuid", "--", IMAGE, POINT)),
        (("-n", "-v", "-s", "-o", "rw,name=a b", "-t", "qcowfuse"), 0, ("-o", "rw,name=a b", "--", IMAGE, POINT)),
        (("-f", "-o", "ro"), 0, ()),
        (("-o", "nonsense"), 2, ("-o", "nonsense", "--", IMAGE, POINT)),
        ((), 5, ("--", IMAGE, POINT)),
    ],
)
def test_the_helper_of_mount(given: tuple[str, ...], code: int, expected: tuple[str, ...], tmp_path: Path) -> None:
    """What mount(8) passes to it reaches qcowfuse whole, and exit codes become those of mount(8)."""
    program = tmp_path / "qcowfuse"
    program.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\"\nexit {code}\n")
    program.chmod(0o755)
    done = subprocess.run(
        [PACKAGING / "mount.qcowfuse", IMAGE, POINT, *given],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert tuple(done.stdout.splitlines()) == expected
    assert done.returncode == {0: 0, 2: 1, 5: 32}[code]


def test_the_helper_alone_says_how_it_is_used() -> None:
    """Called by hand, without arguments."""
    done = subprocess.run([PACKAGING / "mount.qcowfuse"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("usage: mount -t qcowfuse ")


_HOLDING = """
import sys
from pathlib import Path
sys.path.insert(0, "scripts")
from packagelib.folders import own_folder
with own_folder("trial-", Path(sys.argv[1])) as folder:
    (folder / "large").touch()
    print(folder.name, flush=True)
    sys.stdin.readline()
"""


def test_a_killed_run_leaves_no_folder_for_long(tmp_path: Path) -> None:
    """The next run removes what it left, and nothing of a run that goes on, nor what is not a folder of its own."""

    def start() -> subprocess.Popen[str]:
        words = [sys.executable, "-c", _HOLDING, str(tmp_path)]
        return subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment()
        )

    (tmp_path / "trial-link").symlink_to(tmp_path)
    (tmp_path / "other").mkdir()
    with start() as killed, start() as going:
        names = [process.stdout.readline().strip() for process in (killed, going) if process.stdout is not None]
        assert sorted(os.listdir(tmp_path)) == sorted(["other", "trial-link", *names])
        killed.kill()
        killed.wait()
        with start() as third:
            assert third.stdout is not None
            names[0] = third.stdout.readline().strip()
            assert sorted(os.listdir(tmp_path)) == sorted(["other", "trial-link", *names])
            third.communicate("\n")
        assert sorted(os.listdir(tmp_path)) == sorted(["other", "trial-link", names[1]])
        going.communicate("\n")
    assert sorted(os.listdir(tmp_path)) == ["other", "trial-link"]
