"""What pip builds and installs: the contents of the sdist and of the wheel, and an entry point that runs.

The Debian package and the container image are tried on clean systems by ``scripts/package try`` and ``image``.
"""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from qcowfuse._version import __version__

REPOSITORY = Path(__file__).parents[2]
WHEEL_NAME = f"qcowfuse-{__version__}-py3-none-any.whl"


NOT_IN_A_COPY = shutil.ignore_patterns(
    ".venv", ".git", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "build", "dist"
)
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked; built from a copy so that the working tree stays as it is."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(REPOSITORY, folder / "source", ignore=NOT_IN_A_COPY)
    # What builds is asked directly, as pip and python -m build do it, and fetched once for both packages.
    fetched: list[str | Path] = ["-q", "--target", folder / "tools", "setuptools>=77"]
    subprocess.run([sys.executable, "-m", "pip", "install", *fetched], check=True)
    build(folder, "build_sdist", folder / "source")
    with tarfile.open(folder / f"out/qcowfuse-{__version__}.tar.gz") as archive:
        if sys.version_info >= (3, 11, 4):
            archive.extractall(folder, filter="data")
        else:  # Debian 12 has 3.11.2, which has no filters yet
            archive.extractall(folder)
    return folder / f"qcowfuse-{__version__}"


def build(folder: Path, what: str, source: Path) -> None:
    """Call a function of the build backend in a source tree; the product goes to ``folder/out``."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, what, folder / "out"],
        cwd=source,
        env=os.environ | {"PYTHONPATH": str(folder / "tools")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """The wheel, built out of the sdist."""
    build(sdist.parent, "build_wheel", sdist)
    return sdist.parent / "out" / WHEEL_NAME


def test_sdist_holds_what_a_packager_needs(sdist: Path) -> None:
    """Tests, documents, scripts and what packages are made of, with their modes; nothing that was made by a run."""
    for folder in ("docs", "packaging", "qcowfuse", "scripts", "tests"):
        expected = {
            path.relative_to(REPOSITORY): os.access(path, os.X_OK)
            for path in (REPOSITORY / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        found = {
            path.relative_to(sdist): os.access(path, os.X_OK)
            for path in (sdist / folder).rglob("*")
            if path.is_file()
        }
        assert found == expected
    for name in ("CHANGELOG.md", "CONTRIBUTING.md", "Containerfile", "LICENSE", "README.md", "SECURITY.md"):
        assert (sdist / name).read_bytes() == (REPOSITORY / name).read_bytes()


def test_wheel_holds_every_module_and_the_type_marker(wheel: Path) -> None:
    """Exactly the modules of the source tree are in the wheel, and py.typed with them."""
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("qcowfuse/**/*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert "qcowfuse/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "scripts", "packaging", "docs"))]


def test_wheel_holds_the_systemd_units_where_systemd_looks(wheel: Path) -> None:
    """Below /usr/local or /usr, the units land in lib/systemd/system, the one for users in lib/systemd/user."""
    data = f"qcowfuse-{__version__}.data/data/lib/systemd/"
    names = {
        "system/qcowfuse@.service": "qcowfuse@.service",
        "system/qcowfuse-loop@.service": "qcowfuse-loop@.service",
        "user/qcowfuse@.service": "user/qcowfuse@.service",
    }
    archive = zipfile.ZipFile(wheel)
    expected = {
        f"{data}{name}": (REPOSITORY / "qcowfuse/data" / source).read_bytes() for name, source in names.items()
    }
    assert {name: archive.read(name) for name in archive.namelist() if name.startswith(data)} == expected


def test_wheel_holds_man_pages_and_completions(wheel: Path) -> None:
    """Each file that scripts/manual makes is in the wheel, where man and the shells look below a prefix."""
    data = f"qcowfuse-{__version__}.data/data/share/"
    folders = {
        "man/*.1": "man/man1",
        "man/*.8": "man/man8",
        "completions/bash/*": "bash-completion/completions",
        "completions/fish/*": "fish/vendor_completions.d",
        "completions/zsh/*": "zsh/site-functions",
    }
    archive = zipfile.ZipFile(wheel)
    expected = {
        f"{data}{folder}/{path.name}": path.read_bytes()
        for pattern, folder in folders.items()
        for path in (REPOSITORY / "qcowfuse/data").glob(pattern)
    }
    assert {name: archive.read(name) for name in archive.namelist() if name.startswith(data)} == expected


def test_wheel_metadata(wheel: Path) -> None:
    """Name, licence and its text, minimum Python, README and pinned minimums are in the metadata."""
    archive = zipfile.ZipFile(wheel)
    info = f"qcowfuse-{__version__}.dist-info"
    metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
    assert metadata["License-Expression"] == "LGPL-2.1-or-later"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "# qcowfuse" in str(metadata.get_payload())
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {line.split(">=")[0].split("<")[0] for line in needed} == {
        "caio",
        "cryptography",
        "isal",
        "zlib-ng",
        "pyfuse3",
        "sdnotify",
        "trio",
        "zstandard",
    }
    assert all(">=" in line for line in needed)
    assert archive.read(f"{info}/licenses/LICENSE") == (REPOSITORY / "LICENSE").read_bytes()


def test_installed_command_runs(wheel: Path, tmp_path: Path) -> None:
    """pip install of the wheel gives a qcowfuse command that knows its version, and the unit below the prefix."""
    prefix = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", prefix], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(prefix / "bin/python")]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    # What qcowfuse depends on is lent by the environment of the tests, so that nothing is downloaded.
    site = next(prefix.glob("lib/python*/site-packages"))
    (site / "lent.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")) + "\n")
    done = subprocess.run(
        [prefix / "bin/qcowfuse", "--version"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert __version__ in done.stdout
    assert (prefix / "lib/systemd/system/qcowfuse@.service").exists()
