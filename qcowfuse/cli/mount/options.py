"""All options of qcowfuse, a row each: the parser, the help and the list after ``-o`` are made of this table."""

from __future__ import annotations

from ...driver.options import DelayModel
from ..durations import seconds
from ..image_names import NAME_OPTIONS
from ..option_table import Option
from . import values

DEFAULT_LOCK_WAIT = 5.0
"""Seconds. After an unmount, the old daemon may still write back and flush: a new one waits for it."""

_COMMON, _TUNING, _MEASURING = "common options", "tuning", "for measuring"

OPTIONS = (
    Option("read-only", "do not write to the image", _COMMON, "r"),
    Option(
        "snapshot",
        "serve an internal snapshot, with its own size; implies -r, or goes with -x",
        _COMMON,
        metavar="NAME_OR_ID",
    ),
    Option(
        "ephemeral",
        "only read the image, and throw away in the end what is written to the disk: until then it is in a file "
        "without a name in the image's folder, with --ephemeral=DIR in DIR",
        _COMMON,
        "x",
        metavar="DIR",
        is_optional=True,
    ),
    Option(
        "overlay",
        "write to this QCOW2 image over IMAGE, which is only read; made if it is not there",
        _COMMON,
        metavar="FILE",
    ),
    Option(
        "partition",
        "serve one partition of the disk: its number, or its label or UUID in the partition table",
        _COMMON,
        metavar="NUMBER|LABEL|UUID",
        convert=values.partition,
    ),
    Option(
        "partitions",
        "serve each partition as well, as disk.raw.p1, disk.raw.p2 ...; no pages are cached then",
        _COMMON,
    ),
    Option(
        "key-file",
        "the passphrase of an encrypted image, the whole file (a newline counts), - for standard "
        "input; default: systemd's credential qcowfuse.key, else a prompt",
        _COMMON,
        metavar="PATH",
    ),
    Option(
        "growable",
        "truncate -s and writes past the end make the disk larger; it is never made smaller",
        _COMMON,
    ),
    Option(
        "name", "name of the file in the directory (disk.raw)", _COMMON, "n", metavar="NAME", convert=values.file_name
    ),
    Option(
        "idle-timeout",
        "unmount and end when nobody has had the disk open or asked for anything for so long",
        _COMMON,
        metavar="SECONDS",
        convert=values.idle_seconds,
    ),
    Option(
        "metrics",
        "counters for Prometheus by HTTP, at a numeric address (default: 127.0.0.1) or a socket of systemd's",
        _COMMON,
        metavar="[ADDRESS:]PORT|systemd",
        convert=values.metrics_address,
    ),
    Option("allow-other", "let other users in, as far as file modes let them", _COMMON, in_list=False),
    Option("foreground", "stay in the foreground, log to standard error", _COMMON, "f"),
    Option("debug", "log much more, show tracebacks; implies -f", _COMMON, "d"),
    Option("log-file", "append the log to a file instead of syslog", _COMMON, metavar="PATH"),
    Option(
        "o",
        "any long option without its dashes, and: ro, allow_other, allow_root, uid=USER, gid=GROUP, umask=OCTAL, "
        "nonempty, fsname=TEXT, nosuid, nodev, noexec, noatime, sync; what mount(8) adds is accepted",
        _COMMON,
        metavar="OPT,OPT...",
        is_repeated=True,
        in_list=False,
    ),
    Option(
        "user",
        "once it serves, run as this user (only root can; the mount stays root's)",
        _COMMON,
        metavar="NAME",
        convert=values.user,
    ),
    Option("no-sandbox", "keep what serving does not need: other files, other system calls, capabilities", _COMMON),
    *NAME_OPTIONS,
    Option(
        "l2-cache-size",
        "memory for L2 tables: bytes (64M) or tables (128t); 0 is off (default: the whole disk, up to 32M)",
        _TUNING,
        metavar="SIZE",
        convert=values.cache_size,
    ),
    Option("no-writeback-cache", "send each write to the image at once", _TUNING),
    Option(
        "lock-wait",
        f"how long to wait for an image that is in use ({DEFAULT_LOCK_WAIT:g})",
        _TUNING,
        metavar="SECONDS",
        convert=seconds,
    ),
    Option(
        "force-share",
        "with -r or -x: read an image that others write; what is seen may be torn, and old",
        _TUNING,
        "U",
    ),
    Option(
        "ignore-locks",
        "open images that are in use, without locks, for lock managers that are dead: a second writer destroys them",
        _TUNING,
    ),
    Option(
        "aio",
        "how to wait for reads and flushes of the disk (default: io_uring, and threads where the kernel lacks it)",
        _TUNING,
        metavar="io_uring|threads",
        convert=values.uses_io_uring,
    ),
    Option(
        "discard",
        "what a discard (fstrim) does: give space back to the host (unmap, the default), or only zero (ignore)",
        _TUNING,
        metavar="unmap|ignore",
        convert=values.discards,
    ),
    Option(
        "detect-zeroes",
        "writes of nothing but zeroes are stored (off, the default), only noted (on), or give space back as a "
        "discard does (unmap)",
        _TUNING,
        metavar="off|on|unmap",
        convert=values.detect_zeroes,
    ),
    Option(
        "debug-io-delay",
        "delay each access to the image: 1ms, 250us or disk",
        _MEASURING,
        metavar="DELAY",
        convert=DelayModel.parse,
    ),
    Option("debug-image-in-memory", "hold the whole image in locked memory", _MEASURING),
    Option("nonempty", "mount over a directory that holds something", on_command_line=False),
    Option("fsname", "what the table of mounts names as the source", metavar="TEXT", on_command_line=False),
    Option(
        "uid",
        "the owner of the file, a name or a number",
        metavar="USER",
        convert=values.user_id,
        on_command_line=False,
    ),
    Option("gid", "the group of the file", metavar="GROUP", convert=values.group_id, on_command_line=False),
    Option(
        "umask", "the mode bits that the file lacks", metavar="OCTAL", convert=values.umask, on_command_line=False
    ),
)
