"""What the user can say: parsed, checked, and turned into the settings of the disk and of the mount.

1. Nothing that serves is imported here: wrong arguments are told at once, and the process that waits for a daemon
   to be ready, while the daemon imports it, stays small.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from ...daemon.settings import MountSettings, User
from ...driver.options import DetectZeroes, OpenOptions
from ...printable import print_error
from ..exit_codes import ExitCode
from ..image_names import check_names, configured_folders
from .mount_options import GivenOptions, MountOptionError, sort_options, with_values_listed
from .options import DEFAULT_LOCK_WAIT, OPTIONS

_MAX_NAME_OF_PARTS = 255 - len(".p8192")
_BY_NAME = {option.name: option for option in OPTIONS}


class Arguments(NamedTuple):
    """A command line that makes sense. From ``file_name`` to ``idle_timeout`` it is for
    :meth:`mount_settings`. ``metrics`` None, with ``has_metrics``: the socket is systemd's."""

    image: str
    mount_point: str
    open_options: OpenOptions
    ephemeral: str | None
    """The folder for what is written, "" for that of the image, None: it is not thrown away."""
    overlay: str | None
    partition: str | None
    foreground: bool
    debug: bool
    log_file: str | None
    key_file: str | None
    file_name: str
    fuse_options: frozenset[str]
    source: str | None
    writeback_cache: bool
    allow_non_empty: bool
    uid: int | None
    gid: int | None
    umask: int | None
    counts_allocated: bool
    growable: bool
    partitions: bool
    uses_sandbox: bool
    user: User | None
    idle_timeout: float | None
    metrics: tuple[str, int] | None
    has_metrics: bool

    @property
    def descriptors(self) -> frozenset[int]:
        """Inherited descriptors that are named as files (``/dev/fd/63``, a shell's process substitution)."""
        names = (
            self.image,
            self.mount_point,
            self.key_file,
            self.log_file,
            self.open_options.data_file,
            self.overlay,
        )
        found = (re.fullmatch(r"/(?:dev|proc/self)/fd/(\d{1,9})", name) for name in names if name is not None)
        return frozenset(int(match[1]) for match in found if match)

    @property
    def is_ephemeral(self) -> bool:
        """Whether what is written to the disk is thrown away."""
        return self.ephemeral is not None

    @property
    def has_overlay(self) -> bool:
        """Whether writes go to another file than the image."""
        return self.ephemeral is not None or self.overlay is not None

    @property
    def images_with_keys(self) -> Iterator[tuple[str, OpenOptions]]:
        """What may need a passphrase, and how to look."""
        yield self.image, self.open_options
        if self.overlay is not None:
            yield self.overlay, self.open_options._replace(backing_file=self.image, data_file=None, no_backing=False)

    def mount_settings(self) -> MountSettings:
        """Where and how to serve."""
        return MountSettings(
            mount_point=self.mount_point,
            file_name=self.file_name,
            fuse_options=self.fuse_options,
            source=self.source,
            image=os.path.abspath(self.image) if self.has_overlay else None,
            writeback_cache=self.writeback_cache,
            allow_non_empty=self.allow_non_empty,
            uid=self.uid,
            gid=self.gid,
            umask=self.umask,
            ends_on_hangup=self.foreground,
            counts_allocated=self.counts_allocated,
            growable=self.growable,
            serves_partitions=self.partitions,
            uses_sandbox=self.uses_sandbox,
            user=self.user,
            idle_timeout=self.idle_timeout,
        )


def _plain(argv: Sequence[str]) -> dict[str, Any] | None:
    """What argparse would make of IMAGE and MOUNTPOINT with at most -f and -r; None for any other command line.
    To get argparse ready for all options takes as long as to open and mount the image."""
    names = [word for word in argv if not word.startswith("-")]
    flags = {word for word in argv if word.startswith("-")}
    if len(names) != 2 or not flags <= {"-f", "-r"}:
        return None
    return {"image": names[0], "mountpoint": names[1], "foreground": "-f" in flags, "read_only": "-r" in flags}


def _refuse(message: str) -> NoReturn:
    print_error(f"qcowfuse: {message} (qcowfuse --help says more)")
    raise SystemExit(ExitCode.USAGE)


def _check_metrics() -> None:
    import importlib.util

    try:
        found = importlib.util.find_spec("prometheus_client")
    except ImportError:
        found = None
    if found is None:
        _refuse(
            "--metrics needs the Python package prometheus_client: apt install python3-prometheus-client,"
            " or pip install prometheus_client"
        )


class _Given:
    """What was given of each option by its long name: with dashes (``words``, by argparse's names), and in the lists
    after ``-o``."""

    def __init__(self, words: Mapping[str, Any], listed: GivenOptions) -> None:
        self._words = words
        self._listed = listed

    def flag(self, name: str) -> bool:
        """Whether a flag was given."""
        return bool(self._words.get(_BY_NAME[name].key)) or name in self._listed.flags

    def value(self, name: str) -> Any:
        """The value of an option, None where it was not given; what stands with dashes goes before a list. Ends the
        program where the text is none."""
        option = _BY_NAME[name]
        text = self._words.get(option.key)
        text = text or self._listed.values.get(name, text)
        if text is None:
            return None
        try:
            return option.convert(text)
        except ValueError as exc:
            _refuse(f"{name}: {exc}")

    def is_given(self, name: str) -> bool:
        """Whether an option with a value was given."""
        return self._words.get(_BY_NAME[name].key) is not None or name in self._listed.values

    def repeated(self, name: str) -> tuple[str, ...]:
        """All values of an option that may be repeated."""
        return (*self._words.get(_BY_NAME[name].key, ()), *self._listed.repeated.get(name, ()))


def _words_of(argv: Sequence[str], mount_point: str | None) -> Mapping[str, Any]:
    """The words of a command line by the names that argparse has for them. Raises SystemExit."""
    if mount_point is not None:
        from .parser import build_parser

        return {**vars(build_parser(takes_mount_point=False).parse_args(argv)), "mountpoint": mount_point}
    plain = _plain(argv)
    if plain is not None:
        return plain
    from ..near_misses import verb_meant
    from .parser import build_parser

    parser = build_parser(argv)
    known, more = parser.parse_known_args(with_values_listed(argv))
    if more:
        hint = "" if os.path.lexists(known.image) else verb_meant(known.image)
        parser.error(f"unrecognized arguments: {' '.join(more)}{hint}")
    return vars(known)


def _refuse_contradictions(given: _Given, fuse_options: Container[str]) -> None:
    """Ends the program where options exclude each other."""
    flag, value = given.flag, given.value
    if "allow_other" in fuse_options and "allow_root" in fuse_options:
        _refuse("allow_other and allow_root exclude each other")
    if value("detect-zeroes") is DetectZeroes.UNMAP and value("discard") is False:
        _refuse("--detect-zeroes unmap and --discard ignore exclude each other")
    partition, partitions = value("partition"), flag("partitions")
    if partition is not None and flag("growable"):
        _refuse("--growable and --partition exclude each other: what follows a partition belongs to others")
    if partition is not None and partitions:
        _refuse("--partition and --partitions exclude each other")
    if partitions and len(os.fsencode(value("name") or "")) > _MAX_NAME_OF_PARTS:
        _refuse(f"--name: at most {_MAX_NAME_OF_PARTS} bytes with --partitions, which puts .p1 behind it")
    ephemeral, overlay = value("ephemeral"), value("overlay")
    read_only, snapshot = flag("read-only"), value("snapshot")
    if ephemeral is not None and overlay is not None:
        _refuse("--ephemeral and --overlay exclude each other: what is written is thrown away, or it is kept")
    if ephemeral is not None and read_only:
        _refuse("--ephemeral and -r exclude each other: without -r the image is only read as well")
    if overlay is not None and snapshot is not None:
        _refuse(
            "--overlay and --snapshot exclude each other: an overlay cannot name a snapshot; --ephemeral can have one"
        )
    force_share = flag("force-share")
    if force_share and not (read_only or snapshot is not None or ephemeral is not None):
        _refuse("--force-share goes with -r or --ephemeral alone: an image that is written needs its lock")
    if force_share and overlay is not None:
        _refuse("--force-share and --overlay exclude each other: an overlay over an image that changes means nothing")
    try:
        check_names(
            backing_file=value("backing-file"),
            allow_dirs=given.repeated("allow-dir"),
            no_backing=flag("no-backing"),
        )
    except ValueError as exc:
        _refuse(str(exc))


def _open_options(given: _Given) -> OpenOptions:
    """How the image is to be opened."""
    flag, value = given.flag, given.value
    lock_wait = value("lock-wait")
    return OpenOptions(
        read_only=flag("read-only"),
        l2_cache_size=value("l2-cache-size"),
        discard=value("discard") is not False,
        detect_zeroes=value("detect-zeroes") or DetectZeroes.OFF,
        snapshot=value("snapshot"),
        backing_format=value("backing-format"),
        backing_file=value("backing-file"),
        data_file=value("data-file"),
        allow_dirs=(*given.repeated("allow-dir"), *configured_folders()),
        no_backing=flag("no-backing"),
        force_share=flag("force-share"),
        ignore_locks=flag("ignore-locks"),
        lock_wait=DEFAULT_LOCK_WAIT if lock_wait is None else lock_wait,
        io_uring=value("aio") is not False,
        io_delay=value("debug-io-delay"),
        image_in_memory=flag("debug-image-in-memory"),
    )


def parse_arguments(argv: Sequence[str], mount_point: str | None = None) -> Arguments:
    """Parse a command line, or all of it but ``mount_point``. Raises SystemExit, after one line to standard error or
    the help to standard output."""
    words = _words_of(argv, mount_point)
    if not words["image"] or not words["mountpoint"]:
        _refuse("IMAGE or MOUNTPOINT is empty; in /etc/qcowfuse/NAME.conf of qcowfuse@NAME both must be set")
    try:
        listed = sort_options(words.get("o", ()))
    except MountOptionError as exc:
        _refuse(str(exc))
    given = _Given(words, listed)
    flag, value = given.flag, given.value
    fuse_options = set(listed.fuse)
    if flag("allow-other"):
        fuse_options.add("allow_other")
    _refuse_contradictions(given, fuse_options)
    has_metrics = given.is_given("metrics")
    if has_metrics:
        _check_metrics()
    open_options = _open_options(given)
    return Arguments(
        image=words["image"],
        mount_point=words["mountpoint"],
        open_options=open_options,
        ephemeral=value("ephemeral"),
        overlay=value("overlay"),
        partition=value("partition"),
        foreground=flag("foreground") or flag("debug"),
        debug=flag("debug"),
        log_file=value("log-file"),
        key_file=value("key-file"),
        file_name=value("name") or "disk.raw",
        fuse_options=frozenset(fuse_options),
        source=value("fsname"),
        writeback_cache=not flag("no-writeback-cache"),
        allow_non_empty=flag("nonempty"),
        uid=value("uid"),
        gid=value("gid"),
        umask=value("umask"),
        counts_allocated=open_options.io_delay is None,
        growable=flag("growable"),
        partitions=flag("partitions"),
        uses_sandbox=not flag("no-sandbox"),
        user=value("user"),
        idle_timeout=value("idle-timeout"),
        metrics=value("metrics"),
        has_metrics=has_metrics,
    )
