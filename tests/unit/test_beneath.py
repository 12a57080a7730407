"""Files found by names from strangers: what lies beneath is found, nothing else is touched."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import random
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from qcowfuse.storage.beneath import (
    MAX_DEPTH,
    MAX_LINKS,
    Folder,
    OutsideError,
    UnfitFileError,
    find_file,
    open_folder,
    open_folders,
)

_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    """``in/`` is the folder; ``out/`` is not."""
    n_open = len(os.listdir("/proc/self/fd"))
    for name in ("in/a/b", "out"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "in/base").write_bytes(b"base")
    (tmp_path / "in/a/deep").write_bytes(b"deep")
    (tmp_path / "out/secret").write_bytes(b"secret")
    yield tmp_path
    assert len(os.listdir("/proc/self/fd")) == n_open, "descriptors are left open"


def read(tree: Path, name: str, *allowed: str | Path) -> bytes:
    """The bytes of what is found from ``in/``."""
    start, others = open_folder(str(tree / "in")), open_folders(map(str, allowed))
    try:
        found = find_file(start, name, others)
    finally:
        for folder in (start, *others):
            folder.close()
    try:
        fd = found.open(writable=False)
        try:
            assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK == 0
            return os.read(fd, 100)
        finally:
            os.close(fd)
    finally:
        found.close()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("base", b"base"),
        ("./base", b"base"),
        ("a/deep", b"deep"),
        ("a//b/../deep", b"deep"),
        ("a/../base", b"base"),
        ("{in}/base", b"base"),
        ("{in}/a/../base", b"base"),
    ],
)
def test_what_lies_beneath_is_found(name: str, data: bytes, tree: Path) -> None:
    """Relative and absolute names, with dots in them."""
    assert read(tree, name.replace("{in}", str(tree / "in"))) == data


@pytest.mark.parametrize(
    "name", ["../out/secret", "a/../../out/secret", "{tree}/out/secret", "/etc/passwd", "..", "/"]
)
def test_what_lies_outside_is_not(name: str, tree: Path) -> None:
    """By whatever name, and the error says where it would be."""
    with pytest.raises(OutsideError) as raised:
        read(tree, name.replace("{tree}", str(tree)))
    if "secret" in name:
        assert raised.value.target == str(tree / "out/secret")


def test_a_folder_whose_name_begins_alike_is_another(tree: Path) -> None:
    """``inner`` is not beneath ``in``."""
    (tree / "inner").mkdir()
    (tree / "inner/x").touch()
    for name in (str(tree / "inner/x"), "../inner/x"):
        with pytest.raises(OutsideError):
            read(tree, name)


@pytest.mark.parametrize(
    ("link", "target", "data"),
    [
        ("in/link", "a/deep", b"deep"),
        ("in/a/link", "../base", b"base"),
        ("in/link", "{tree}/in/a/deep", b"deep"),
        ("in/link", "a/b/../deep", b"deep"),
        ("in/link", "../out/secret", None),
        ("in/link", "{tree}/out/secret", None),
        ("in/link", "a/../../out/secret", None),
        ("in/a/link", "../../out/secret", None),
    ],
)
def test_links_are_followed_beneath(link: str, target: str, data: bytes | None, tree: Path) -> None:
    """A link that stays beneath is fine, one that leads out is not; alone or as a part of the name."""
    os.symlink(target.replace("{tree}", str(tree)), tree / link)
    os.symlink(os.path.dirname(target.replace("{tree}", str(tree))) or ".", tree / (link + "-folder"))
    names = (link.removeprefix("in/"), f"{link.removeprefix('in/')}-folder/{os.path.basename(target)}")
    for name in names:
        if data is not None:
            assert read(tree, name) == data
            continue
        with pytest.raises(OutsideError) as raised:
            read(tree, name)
        assert raised.value.target == str(tree / "out/secret")


def test_links_are_followed_only_so_far(tree: Path) -> None:
    """A loop ends, and so does a chain that is longer than the kernel would follow."""
    os.symlink("loop", tree / "in/loop")
    with pytest.raises(OSError, match="Too many levels") as raised:
        read(tree, "loop")
    assert raised.value.errno == errno.ELOOP
    for number in range(MAX_LINKS + 5):
        os.symlink(f"l{number + 1}", tree / f"in/l{number}")
    os.symlink("base", tree / f"in/l{MAX_LINKS + 5}")
    with pytest.raises(OSError, match="Too many levels"):
        read(tree, "l0")
    assert read(tree, f"l{MAX_LINKS - 20}") == b"base"


def test_a_name_may_not_be_too_long_or_deep(tree: Path) -> None:
    """Each folder on the way is a descriptor, so they are counted."""
    for name in ("x" * 5000, "a/" * 3000 + "x", "../a/" * 1000):
        with pytest.raises((OSError, OutsideError)):
            read(tree, name)
    folder = tree / "in"
    for _ in range(MAX_DEPTH + 2):
        folder = folder / "d"
        folder.mkdir()
    with pytest.raises(OSError, match="folders deep") as raised:
        read(tree, "d/" * (MAX_DEPTH + 1) + "x")
    assert raised.value.errno == errno.ENAMETOOLONG


def test_the_allowed_folders_widen_it(tree: Path) -> None:
    """By absolute name, by ``..`` and by a link, however the folder was given; not what is outside of that again."""
    os.symlink(tree / "out/secret", tree / "in/link")
    os.symlink(tree / "out", tree / "by-link")
    (tree / "out/sub").mkdir()
    os.symlink("../in/base", tree / "out/back")
    os.symlink("/etc/passwd", tree / "out/further")
    for allowed in (tree / "out", tree / "by-link", tree / "in/../out"):
        for name in (str(tree / "out/secret"), "../out/secret", "link", "../out/sub/../secret"):
            assert read(tree, name, allowed) == b"secret"
        assert read(tree, "../out/back", allowed) == b"base"
        with pytest.raises(OutsideError, match="/etc/passwd"):
            read(tree, "../out/further", allowed)
    assert read(tree, str(tree / "by-link/secret"), tree / "by-link") == b"secret"
    assert read(tree, "../out/secret", tree / "missing", "/") == b"secret"
    with pytest.raises(OutsideError):
        read(tree, "../out/secret", tree / "missing", tree / "out/sub")


def test_names_in_the_file_start_where_its_name_was_looked_up(tree: Path) -> None:
    """The folder that comes with a file is that of its name: a link as the last component does not move it."""
    os.symlink("a/deep", tree / "in/link")
    os.symlink("a/b", tree / "in/short")
    (tree / "in/a/b/low").touch()
    for name, folder in {"link": "in", "a/deep": "in/a", "short/low": "in/a/b", "short/../deep": "in/a"}.items():
        start = open_folder(str(tree / "in"))
        found = find_file(start, name)
        start.close()
        assert found.folder.path == str(tree / folder)
        assert os.path.samestat(os.fstat(found.folder.fd), (tree / folder).stat())
        found.close()


def test_what_comes_with_a_file_is_no_way_out(tree: Path) -> None:
    """The folder of one file is the start for the names in it, and is left as little as the first."""
    start = open_folder(str(tree / "in"))
    found = find_file(start, "a/deep")
    try:
        for name in ("../base", str(tree / "in/base"), "/etc/passwd"):
            with pytest.raises(OutsideError):
                find_file(found.folder, name)
    finally:
        found.close()
        start.close()


def test_only_regular_files_are_fit(tree: Path) -> None:
    """A FIFO, a socket, a directory: named in the error, and none of them is opened."""
    os.mkfifo(tree / "in/fifo")
    expected = {"fifo": "a FIFO", "socket": "a socket", **dict.fromkeys(("a", "a/", "a/b/..", "."), "a directory")}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tree / "in/socket"))
        for name, what in expected.items():
            with pytest.raises(UnfitFileError, match=what):
                read(tree, name)
    for name in ("base/x", "base/", "base/."):
        with pytest.raises(NotADirectoryError):
            read(tree, name)
    with pytest.raises(FileNotFoundError):
        read(tree, "missing")


@pytest.mark.parametrize("name", ["/proc/self/mem", "/proc/self/environ", "/sys/kernel/uevent_seqnum"])
def test_files_of_the_kernel_are_never_fit(name: str, tree: Path) -> None:
    """Not even where everything is allowed: they claim to be regular files."""
    with pytest.raises(UnfitFileError, match="kernel's"):
        read(tree, name, "/")


@pytest.mark.parametrize("name", ["/dev/null", "/dev/tty", "/dev/zero"])
def test_character_devices_are_never_fit(name: str, tree: Path) -> None:
    """Not even where everything is allowed."""
    with pytest.raises(UnfitFileError, match="a character device"):
        read(tree, name, "/")


@pytest.mark.root
def test_a_block_device_must_be_allowed(tree: Path) -> None:
    """In the image's own folder it is refused; beneath an allowed folder it is found."""
    os.mknod(tree / "in/device", stat.S_IFBLK | 0o600, os.makedev(7, 250))
    with pytest.raises(UnfitFileError, match="a block device") as raised:
        read(tree, "device")
    assert raised.value.is_block_device
    start, allowed = open_folder(str(tree / "in")), open_folder(str(tree / "in"))
    found = find_file(start, "device", [allowed])
    assert stat.S_ISBLK(found.status.st_mode)
    for one in (found, start, allowed):
        one.close()


@pytest.mark.root
def test_links_of_others_in_a_shared_folder_do_not_count(tree: Path) -> None:
    """As the kernel does with names in /tmp: a link there counts if it is one's own, or the folder's owner's."""
    shared = tree / "in/shared"
    shared.mkdir()
    shared.chmod(0o1777)
    os.symlink("../base", shared / "own")
    os.symlink("../base", shared / "planted")
    os.lchown(shared / "planted", 4321, 4321)
    assert read(tree, "shared/own") == b"base"
    with pytest.raises(PermissionError, match="another user"):
        read(tree, "shared/planted")
    os.chown(shared, 4321, 4321)
    assert read(tree, "shared/planted") == b"base"


def test_the_file_that_was_judged_is_the_one_that_is_opened(tree: Path) -> None:
    """Replaced by a link to something else, or by a FIFO, after it was found: what is opened stays the same."""
    for replace in (lambda path: os.symlink("../out/secret", path), os.mkfifo):
        path = tree / "in/victim"
        path.write_bytes(b"judged")
        start = open_folder(str(tree / "in"))
        found = find_file(start, "victim")
        path.unlink()
        replace(path)
        fd = found.open(writable=True)
        assert os.read(fd, 10) == b"judged"
        os.close(fd)
        found.close()
        start.close()
        path.unlink()


def test_a_race_never_leads_out(tree: Path) -> None:
    """While another thread keeps exchanging a folder for a link that leads out, nothing out there is found."""
    (tree / "in/swap").mkdir()
    (tree / "in/swap/secret").write_bytes(b"inside")
    os.symlink("../out", tree / "in/other")
    done = threading.Event()

    def exchange() -> None:
        first, second = (os.fsencode(tree / "in" / name) for name in ("swap", "other"))
        while not done.is_set():
            _libc.renameat2(-100, first, -100, second, 2)

    thread = threading.Thread(target=exchange)
    thread.start()
    seen = set()
    try:
        for _ in range(3000):
            try:
                seen.add(read(tree, "swap/secret"))
            except (OutsideError, OSError) as error:
                seen.add(type(error).__name__.encode())
    finally:
        done.set()
        thread.join()
    assert b"inside" in seen
    assert b"secret" not in seen


def _openat2_beneath(folder: Folder, name: str) -> bytes | int:
    """What the kernel's own RESOLVE_BENEATH finds: the bytes, or the errno."""
    how = struct.pack("=QQQ", os.O_RDONLY | os.O_CLOEXEC, 0, 0x08)
    fd = _libc.syscall(437, folder.fd, os.fsencode(name), how, len(how))
    if fd < 0:
        return ctypes.get_errno()
    try:
        return os.read(fd, 100) if stat.S_ISREG(os.fstat(fd).st_mode) else errno.EISDIR
    finally:
        os.close(fd)


def test_the_walk_agrees_with_openat2(tree: Path) -> None:
    """On random trees with random links, relative names lead where RESOLVE_BENEATH leads."""
    folder = open_folder(str(tree / "in"))
    outcomes: dict[str, int] = {}
    try:
        if _openat2_beneath(folder, "base") == errno.ENOSYS:
            pytest.skip("this kernel has no openat2")
        chooser = random.Random(5)
        parts = ["a", "b", "deep", "base", "..", ".", "l0", "l1", "l2", "l3"]
        for _ in range(300):
            for number in range(4):
                link = tree / "in" / chooser.choice(["", "a", "a/b"]) / f"l{number}"
                link.unlink(missing_ok=True)
                os.symlink("/".join(chooser.choices(parts, k=chooser.randint(1, 3))), link)
            for _ in range(10):
                name = "/".join(chooser.choices(parts, k=chooser.randint(1, 4)))
                expected = _openat2_beneath(folder, name)
                kind = _compare(partial(read, tree, name), expected, name)
                outcomes[kind] = outcomes.get(kind, 0) + 1
    finally:
        folder.close()
    assert {"found", "outside"} <= set(outcomes), outcomes


def _compare(find: Callable[[], bytes], expected: bytes | int, name: str) -> str:
    """``find`` must come to what the kernel came to; EXDEV may also be a name that leads out and in again: that is no
    harm, and found."""
    found: bytes | int
    try:
        found, kind = find(), "found"
    except OutsideError:
        found, kind = errno.EXDEV, "outside"
    except UnfitFileError:
        found, kind = errno.EISDIR, "folder"
    except OSError as error:
        found, kind = error.errno or 0, "error"
    assert expected in (found, errno.EXDEV), (name, kind, found)
    return kind
