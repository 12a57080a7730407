"""The command line: what is accepted, what it means, what is refused, and how that is said."""

from __future__ import annotations

import errno
import inspect
import re

import pytest

from qcowfuse import __version__, errors
from qcowfuse.cli.exit_codes import EXPLANATIONS, ExitCode, exit_code_of
from qcowfuse.cli.mount import values
from qcowfuse.cli.mount.arguments import Arguments, parse_arguments
from qcowfuse.cli.mount.mount_options import MountOptionError, sort_options, split_options
from qcowfuse.driver.options import L2CacheSize
from tests.support.mounting import run_qcowfuse

FROM_MOUNT = (
    "rw,dev,suid,exec,async,atime,relatime,_netdev,nofail,user,noauto,x-systemd.automount,comment=a b,defaults"
)


def parse(*options: str) -> Arguments:
    return parse_arguments([*options, "image", "mount"])


def refuse(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which the arguments are refused."""
    with pytest.raises(SystemExit) as caught:
        parse_arguments(arguments)
    assert caught.value.code == ExitCode.USAGE
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def test_defaults() -> None:
    """Without options: a writable daemon, the file disk.raw, the write-back cache on, some patience for a lock."""
    given = parse()
    assert (given.image, given.mount_point, given.file_name) == ("image", "mount", "disk.raw")
    assert not any((given.foreground, given.debug, given.open_options.read_only, given.fuse_options))
    assert given.writeback_cache
    assert given.open_options.lock_wait == 5
    assert given.open_options.l2_cache_size is None
    assert given.open_options.io_uring


def test_own_options_have_two_ways_in() -> None:
    """A long option and the same after -o mean the same."""
    long = parse(
        *("--read-only", "--name=x.raw", "--l2-cache-size=64M", "--lock-wait=1", "--no-writeback-cache", "-f"),
        *("--debug-io-delay=1ms", "--debug-image-in-memory", "--allow-other", "--log-file=/tmp/l"),
        *("--backing-format=qcow2", "--data-file=d.raw", "--aio=threads"),
        *("--backing-file=b,1.raw", "--allow-dir=/a", "--allow-dir=/b"),
    )
    short = parse(
        "-o",
        "ro,name=x.raw,l2_cache_size=64M,lock-wait=1,no_writeback_cache,foreground",
        "-o",
        "debug-io-delay=1ms,debug_image_in_memory,allow_other,log-file=/tmp/l,backing_format=qcow2,data_file=d.raw",
        "-o",
        "aio=threads,backing-file=b\\,1.raw,allow_dir=/a,allow-dir=/b",
    )
    assert long == short
    assert long.open_options.read_only
    assert long.open_options.backing_format == "qcow2"
    assert long.open_options.data_file == "d.raw"
    assert long.open_options.backing_file == "b,1.raw"
    assert long.open_options.allow_dirs[:2] == ("/a", "/b")
    assert parse("-o", "no-backing") == parse("--no-backing")
    assert parse("--no-backing").open_options.no_backing
    assert long.fuse_options == {"allow_other"}
    assert not long.open_options.io_uring


def test_what_mount_adds_is_accepted() -> None:
    """What mount(8) and fstab put between the options changes nothing."""
    assert parse("-o", FROM_MOUNT) == parse()


def test_kernel_flags_are_passed_on() -> None:
    """nosuid, nodev, noexec, noatime and sync reach the mount; a later opposite takes them back."""
    assert parse("-o", "nosuid,nodev,noexec,noatime,sync,exec").fuse_options == {
        *("nosuid", "nodev", "noatime", "sync")
    }


def test_later_options_win() -> None:
    """ro and rw: the last one counts."""
    assert parse("-o", "rw", "-o", "ro").open_options.read_only
    assert not parse("-o", "ro,rw").open_options.read_only


def test_debug_stays_in_the_foreground() -> None:
    """-d implies -f."""
    assert parse("-d").foreground
    assert parse("-d").debug


def test_ownership_options() -> None:
    """uid, gid and umask are numbers, the mask in octal."""
    by_name = parse("-o", "uid=root,gid=root")
    assert (by_name.uid, by_name.gid) == (0, 0)
    given = parse("-o", "uid=1000,gid=100,umask=022")
    assert (given.uid, given.gid, given.umask) == (1000, 100, 0o022)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a,b=c", ["a", "b=c"]),
        (r"name=a\,b,ro", ["name=a,b", "ro"]),
        (r"name=a\\,ro", ["name=a\\", "ro"]),
        (",,a,", ["a"]),
        ("name=with blank", ["name=with blank"]),
    ],
)
def test_option_lists_are_split_as_mount_does(text: str, parts: list[str]) -> None:
    """Commas separate, a backslash protects."""
    assert split_options(text) == parts


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("bogus", "bogus"),
        ("bogus=1", "bogus"),
        ("remount", "remount"),
        ("name", "name"),
        ("name=", "name"),
        ("debug=1", "debug"),
        ("auto_unmount", "auto_unmount"),
    ],
)
def test_unknown_mount_options_are_refused_by_name(option: str, named: str) -> None:
    """What is not known, or has a value too many or too few, is named."""
    with pytest.raises(MountOptionError, match=named):
        sort_options([f"rw,{option},dev"])


def test_remount_is_refused_before_all_else() -> None:
    """mount(8) of util-linux 2.41 puts the options of the mount first: none of them is the user's mistake."""
    present = "rw,nosuid,nodev,relatime,user_id=0,group_id=0,default_permissions,allow_other"
    for lists in ([f"{present},remount,ro"], [present, "remount"]):
        with pytest.raises(MountOptionError, match=r"^remount is not possible"):
            sort_options(lists)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("65536", L2CacheSize(n_bytes=65536)),
        ("64M", L2CacheSize(n_bytes=64 << 20)),
        ("64m", L2CacheSize(n_bytes=64 << 20)),
        ("512KiB", L2CacheSize(n_bytes=512 << 10)),
        ("1GB", L2CacheSize(n_bytes=1 << 30)),
        ("0", L2CacheSize(n_bytes=0)),
        ("128t", L2CacheSize(n_tables=128)),
        ("0t", L2CacheSize(n_tables=0)),
    ],
)
def test_cache_sizes(text: str, size: L2CacheSize) -> None:
    """Bytes with or without a suffix, or tables."""
    assert values.cache_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5M", "64X", "t", "64Mt", "٣", "1 M x"])
def test_bad_cache_sizes(text: str) -> None:
    """Anything else is refused."""
    with pytest.raises(ValueError, match="bad size"):
        values.cache_size(text)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["image"],
        ["image", "mount", "more"],
        ["--bogus", "image", "mount"],
        ["--read", "image", "mount"],
        ["--name", "a/b", "image", "mount"],
        ["--name", "..", "image", "mount"],
        ["--name", "", "image", "mount"],
        ["--l2-cache-size", "many", "image", "mount"],
        ["--lock-wait", "-1", "image", "mount"],
        ["--lock-wait", "nan", "image", "mount"],
        ["--debug-io-delay", "fast", "image", "mount"],
        ["--aio", "native", "image", "mount"],
        ["--backing-format", "vmdk", "image", "mount"],
        ["--no-backing", "--allow-dir", "/", "image", "mount"],
        ["-o", "no-backing,backing-file=x", "image", "mount"],
        ["-o", "allow-dir", "image", "mount"],
        ["-o", "umask=9", "image", "mount"],
        ["-o", "uid=no-such-user", "image", "mount"],
        ["-o", "gid=no-such-group", "image", "mount"],
        ["-o", "uid=4294967295", "image", "mount"],
        ["-o", "remount", "image", "mount"],
        ["-o", "allow_other,allow_root", "image", "mount"],
    ],
    ids=" ".join,
)
def test_bad_arguments_are_refused_in_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    """Code 2 and one line that says where help is."""
    assert "--help" in refuse(capsys, *arguments)


def test_version_and_help() -> None:
    """--version prints the version; --help explains every option, every exit code, and how to end it."""
    version = run_qcowfuse("--version")
    assert (version.returncode, version.stdout) == (0, f"qcowfuse {__version__}\n")
    shown = run_qcowfuse("--help", COLUMNS="100")
    assert (shown.returncode, shown.stderr) == (0, "")
    for code, text in EXPLANATIONS.items():
        assert f"  {code.value}  {text}\n" in shown.stdout
    for word in (
        "--read-only",
        "--foreground",
        "--l2-cache-size",
        "--lock-wait",
        "--debug-io-delay",
        "fusermount3 -u",
    ):
        assert word in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 100


def test_every_exit_code_is_explained() -> None:
    """The enum and its explanations name the same codes."""
    assert set(EXPLANATIONS) == set(ExitCode)


def test_exceptions_have_exit_codes() -> None:
    """Each of our exceptions and each OSError ends in a code of its own kind; anything else is unexpected."""
    expected = {
        errors.ImageLockedError: ExitCode.LOCKED,
        errors.MountError: ExitCode.MOUNT,
        errors.StoppedEarlyError: ExitCode.MOUNT,
    }
    for _, cls in inspect.getmembers(errors, inspect.isclass):
        if issubclass(cls, errors.QcowFuseError):
            exc = cls.__new__(cls)
            assert exit_code_of(exc) == expected.get(cls, ExitCode.IMAGE)
    assert exit_code_of(PermissionError(errno.EACCES, "x")) == ExitCode.SYSTEM
    assert exit_code_of(ZeroDivisionError()) == ExitCode.UNEXPECTED


def test_messages_are_one_printable_line() -> None:
    """A file name with control characters cannot play tricks with the terminal."""
    done = run_qcowfuse("no\nsuch\x1b[31mimage", "/nowhere/\x1b[31m\n")
    assert done.returncode == ExitCode.MOUNT
    assert done.stderr.count("\n") == 1
    assert re.fullmatch(r"[ -~]+\n", done.stderr)
