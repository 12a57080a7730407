"""A Debian package for the system that builds it, with all Python packages inside that qcowfuse needs.

1. Everything lies in /usr/lib/qcowfuse, which is in the path of qcowfuse's own programs alone. So no other program
   sees it, and the versions are those that pyproject.toml asks for, whatever Debian's own are.
2. pyfuse3 is compiled for one version of Python and of libfuse. So a package is for one release, and depends on both.
3. The version comes from qcowfuse/_version.py, and the revision says which release it is for.
"""

from __future__ import annotations

import email
import email.utils
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGING = REPOSITORY / "packaging"
DATA = REPOSITORY / "qcowfuse" / "data"
BUILD_PACKAGES = (
    *("python3", "python3-venv", "python3-dev", "gcc", "libc6-dev", "pkg-config", "libfuse3-dev", "dpkg-dev"),
    *("binutils", "ca-certificates"),
)
"""What building needs, besides a network for pip."""
MODULES = Path("usr/lib/qcowfuse")
DESCRIPTION = """mount QCOW and QCOW2 disk images, read and write
 qcowfuse serves a QCOW or QCOW2 image as one raw file of the size of its disk,
 by FUSE: losetup, fsck, dd or a virtual machine use the disk as it is. It needs
 neither QEMU nor root. qcowfuse-img looks at images, checks and mends them,
 makes new ones and handles their snapshots.
"""


class BuildError(Exception):
    """A package could not be made; the message says why."""


def version() -> str:
    """Of the program."""
    match = re.search(r'__version__ = "(.*)"', (REPOSITORY / "qcowfuse/_version.py").read_text())
    assert match is not None
    return match[1]


def build_deb(output: Path, revision: int) -> Path:
    """Make the package for this system in ``output``; its path. Raises BuildError."""
    missing = [name for name in BUILD_PACKAGES if not _is_installed(name)]
    if missing:
        raise BuildError(f"building needs Debian packages: apt-get install {' '.join(missing)}")
    # Files get the time of the source: the same source with the same Python packages gives the same package.
    os.environ.setdefault("SOURCE_DATE_EPOCH", str(source_time()))
    architecture = _output("dpkg", "--print-architecture")
    full_version = f"{version()}-{revision}{_release()}"
    with tempfile.TemporaryDirectory(prefix="qcowfuse-deb-") as folder:
        stage = Path(folder) / "stage"
        stage.mkdir(mode=0o755)
        _install_modules(stage, Path(folder))
        _install_files(stage, full_version)
        depends = [*_shared_libraries(stage, Path(folder)), *_python_bounds(), "fuse3"]
        _write_control(stage, full_version, architecture, depends)
        for path in (stage, *stage.rglob("*")):
            if not path.is_symlink():
                is_program = path.is_dir() or path.parent.name in ("bin", "sbin") or path.parent.name == "DEBIAN"
                is_program = is_program and path.name not in ("control", "conffiles", "md5sums")
                path.chmod(0o755 if is_program else 0o644)
        output.mkdir(parents=True, exist_ok=True)
        package = output / f"qcowfuse_{full_version}_{architecture}.deb"
        _run("dpkg-deb", "--root-owner-group", "-Zxz", "--build", stage, package)
    return package


def _release() -> str:
    fields = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    names = {"debian": "deb", "ubuntu": "ubuntu"}
    name, number = fields.get("ID", "").strip('"'), fields.get("VERSION_ID", "").strip('"')
    return f"~{names.get(name, name)}{number}"


def _install_modules(stage: Path, folder: Path) -> None:
    # pip builds in the folder of the source, so it gets a copy.
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    shutil.copytree(REPOSITORY / "qcowfuse", source / "qcowfuse", ignore=shutil.ignore_patterns("__pycache__"))
    _run("/usr/bin/python3", "-m", "venv", folder / "pip")
    _run("/usr/bin/python3", "-m", "venv", "--without-pip", folder / "venv")
    pip = (
        folder / "pip/bin/python",
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--python",
        folder / "venv/bin/python",
    )
    _run(*pip, "install", "-q", "--no-compile", "--use-pep517", source)
    (made,) = (folder / "venv/lib").glob("python3*/site-packages")
    target = stage / MODULES
    shutil.copytree(made, target)
    for tests in [path for path in target.rglob("_tests") if path.is_dir()]:
        shutil.rmtree(tests)
    for path in target.rglob("*.so*"):
        _run("strip", "--strip-unneeded", path)
    for record in target.glob("*.dist-info/RECORD"):
        record.unlink()  # it is about files that have moved


def _install_files(stage: Path, full_version: str) -> None:
    launcher = (PACKAGING / "launcher").read_text()
    for program in ("qcowfuse", "qcowfuse-img"):
        _write(stage / "usr/bin" / program, launcher.replace("FUNCTION", program.replace("-", "_")))
    _write(stage / "usr/sbin/mount.qcowfuse", (PACKAGING / "mount.qcowfuse").read_text())
    _write(stage / "etc/qcowfuse/qcowfuse.conf", (PACKAGING / "qcowfuse.conf").read_text())
    _copy_all(DATA.glob("*.service"), stage / "usr/lib/systemd/system")
    _copy_all((DATA / "user").glob("*.service"), stage / "usr/lib/systemd/user")
    _copy_all((DATA / "completions/bash").iterdir(), stage / "usr/share/bash-completion/completions")
    _copy_all((DATA / "completions/fish").iterdir(), stage / "usr/share/fish/vendor_completions.d")
    _copy_all((DATA / "completions/zsh").iterdir(), stage / "usr/share/zsh/vendor-completions")
    for page in (DATA / "man").iterdir():
        _write(stage / f"usr/share/man/man{page.suffix[1:]}" / f"{page.name}.gz", page.read_text())
    # The helper is described by the page of what it runs.
    (stage / "usr/share/man/man8/mount.qcowfuse.8.gz").symlink_to("../man1/qcowfuse.1.gz")
    documents = stage / "usr/share/doc/qcowfuse"
    _copy_all((REPOSITORY / "docs").glob("*.md"), documents / "docs")
    _copy_all([REPOSITORY / "README.md", REPOSITORY / "SECURITY.md"], documents)
    _write(documents / "changelog.gz", (REPOSITORY / "CHANGELOG.md").read_text())
    _write(documents / "copyright", _copyright(stage / MODULES))
    date = email.utils.formatdate(int(os.environ["SOURCE_DATE_EPOCH"]))
    entry = (
        f"qcowfuse ({full_version}) unstable; urgency=medium\n\n  * See changelog.gz.\n\n -- {maintainer()}  {date}\n"
    )
    _write(documents / "changelog.Debian.gz", entry)
    _write(stage / "usr/share/lintian/overrides/qcowfuse", (PACKAGING / "lintian-overrides").read_text())


def _copyright(modules: Path) -> str:
    stanzas = [
        "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\nUpstream-Name: qcowfuse",
        "Files: *\nCopyright: 2026 the authors of qcowfuse\nLicense: LGPL-2.1+",
    ]
    for metadata in sorted(modules.glob("*.dist-info/METADATA")):
        fields = email.message_from_bytes(metadata.read_bytes())
        if fields["Name"] == "qcowfuse":
            continue
        classifiers = [line.split(" :: ")[-1] for line in fields.get_all("Classifier", []) if "License ::" in line]
        licence = fields["License-Expression"] or ", ".join(classifiers) or (fields["License"] or "").split("\n")[0]
        folder = f"/{MODULES}/{metadata.parent.name}"
        names = sorted(
            {
                line.partition(",")[0].partition("/")[0]
                for line in (metadata.parent / "top_level.txt").read_text().split()
            }
            if (metadata.parent / "top_level.txt").exists()
            else {fields["Name"].replace("-", "_")}
        )
        stanzas.append(
            f"Files: {' '.join(f'usr/lib/qcowfuse/{name}*' for name in names)}\n"
            f"Copyright: the authors of {fields['Name']} {fields['Version']}\n"
            f"License: {re.sub(r'[^A-Za-z0-9.+]+', '-', licence).strip('-')}\n {licence}; the text is in {folder}."
        )
    stanzas.append(
        "License: LGPL-2.1+\n The GNU Lesser General Public License, version 2.1 or any later version;\n"
        " version 2.1 is in /usr/share/common-licenses/LGPL-2.1."
    )
    return "\n\n".join(stanzas) + "\n"


def _shared_libraries(stage: Path, folder: Path) -> list[str]:
    """The packages that the compiled modules need, by dpkg-shlibdeps."""
    (folder / "debian").mkdir()
    (folder / "debian/control").write_text("Source: qcowfuse\n\nPackage: qcowfuse\nArchitecture: any\n")
    compiled = [path for path in (stage / MODULES).rglob("*.so*") if path.is_file()]
    private = {f"-l{path.parent}" for path in compiled if path.parent.name.endswith(".libs")}
    command = ["dpkg-shlibdeps", "-O", "--warnings=0", "--ignore-missing-info", f"-S{stage}", *sorted(private)]
    done = subprocess.run([*command, *compiled], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"dpkg-shlibdeps: {done.stderr[-2000:]}")
    return [name.strip() for name in done.stdout.strip().removeprefix("shlibs:Depends=").split(",") if name.strip()]


def _python_bounds() -> list[str]:
    text = _output("/usr/bin/python3", "-c", "import sys; print(*sys.version_info[:2])")
    major, minor = map(int, text.split())
    return [f"python3 (>= {major}.{minor})", f"python3 (<< {major}.{minor + 1})"]


def _write_control(stage: Path, full_version: str, architecture: str, depends: list[str]) -> None:
    files = sorted(path for path in stage.rglob("*") if path.is_file() and not path.is_symlink())
    n_kib = sum(-(-path.stat().st_size // 1024) for path in files)
    control = f"""\
        Package: qcowfuse
        Version: {full_version}
        Architecture: {architecture}
        Maintainer: {maintainer()}
        Installed-Size: {n_kib}
        Depends: {", ".join(depends)}
        Recommends: libgcrypt20
        Suggests: attr, e2fsprogs, fuse2fs, ntfs-3g, python3-prometheus-client
        Section: utils
        Priority: optional
        """
    _write(stage / "DEBIAN/control", f"{textwrap.dedent(control)}Description: {DESCRIPTION}")
    _write(stage / "DEBIAN/conffiles", "/etc/qcowfuse/qcowfuse.conf\n")
    sums = [f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.relative_to(stage)}" for path in files]
    _write(stage / "DEBIAN/md5sums", "\n".join(line for line in sums if "  etc/" not in line) + "\n")
    for name in ("postinst", "prerm", "postrm"):
        _write(stage / "DEBIAN" / name, (PACKAGING / name).read_text())


def maintainer() -> str:
    """Of the package: as Debian's own tools take it from the environment, else who made the last commit."""
    if "DEBEMAIL" in os.environ:
        return f"{os.environ.get('DEBFULLNAME', 'qcowfuse maintainers')} <{os.environ['DEBEMAIL']}>"
    return _last_commit("%an <%ae>") or "qcowfuse maintainers <root@localhost>"


def source_time() -> int:
    """When the source was made, in seconds since 1970: the time of the last commit, whenever that was checked out; of
    an unpacked archive the time of the changelog in it."""
    return int(_last_commit("%ct") or (REPOSITORY / "CHANGELOG.md").stat().st_mtime)


def _last_commit(form: str) -> str:
    """``form`` filled in by git log; empty where there is no git or no repository."""
    command = ["git", "-C", str(REPOSITORY), "log", "-1", f"--format={form}"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    path.write_bytes(gzip.compress(data, 9, mtime=0) if path.suffix == ".gz" else data)


def _copy_all(paths: Iterable[Path], folder: Path) -> None:
    for path in paths:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / path.name)


def _is_installed(package: str) -> bool:
    command = ["dpkg-query", "-W", "-f=${db:Status-Abbrev}", package]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.startswith("ii")


def _output(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def _run(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), stdout=sys.stderr, check=False)
    if done.returncode:
        raise BuildError(f"failed: {' '.join(map(str, command))}")
