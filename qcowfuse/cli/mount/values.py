"""The texts of options as values: each function raises ValueError with what is wrong and what was expected."""

from __future__ import annotations

import os
import re

from ...daemon.settings import User
from ...driver.options import DetectZeroes, L2CacheSize
from ..durations import seconds

_SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def cache_size(text: str) -> L2CacheSize:
    """``64M``, ``512KiB``, ``0``, or ``128t`` for tables."""
    word = text.strip()
    if match := re.fullmatch(r"(\d{1,9})t", word, re.ASCII):
        return L2CacheSize(n_tables=int(match[1]))
    match = re.fullmatch(r"(\d{1,15})([KMGT]?)(?:i?B)?", word.upper().replace("IB", "iB"), re.ASCII)
    if match is None:
        raise ValueError(f"bad size {text!r}: expected bytes such as 65536, 512K or 64M, or tables such as 128t")
    return L2CacheSize(n_bytes=int(match[1]) * _SUFFIXES[match[2]])


def idle_seconds(text: str) -> float:
    """As :func:`seconds`, but not 0."""
    number = seconds(text)
    if not number:
        raise ValueError("0 would unmount at once: expected seconds")
    return number


def metrics_address(text: str) -> tuple[str, int] | None:
    """A numeric address and a port: ``9100`` (of 127.0.0.1), ``[::1]:9100``. None for ``systemd``."""
    import ipaddress

    if text == "systemd":
        return None
    host, separator, port = text.rpartition(":")
    try:
        if not re.fullmatch(r"\d{1,5}", port, re.ASCII) or int(port) > 65535:
            raise ValueError
        if host.startswith("[") and host.endswith("]"):
            return str(ipaddress.IPv6Address(host[1:-1])), int(port)
        return str(ipaddress.IPv4Address(host if separator else "127.0.0.1")), int(port)
    except ValueError:
        raise ValueError(f"bad address {text!r}: expected a port, 127.0.0.1:9100 or [::1]:9100") from None


def file_name(text: str) -> str:
    """One component of a path, at most 255 bytes."""
    if text in (".", "..") or "/" in text or not 0 < len(os.fsencode(text)) <= 255:
        raise ValueError(f"bad file name {text!r}: expected one name without a slash")
    return text


def partition(text: str) -> str:
    """Anything but nothing."""
    if not text:
        raise ValueError("expected a number, a label or a UUID")
    return text


def user_id(text: str) -> int:
    """The number or the name of a user, as mount(8) takes it."""
    if (number := _id(text)) is not None:
        return number
    import pwd

    try:
        return pwd.getpwnam(text).pw_uid
    except (KeyError, ValueError):
        raise ValueError(f"bad user {text!r}: expected a name or a number") from None


def group_id(text: str) -> int:
    """The number or the name of a group, as mount(8) takes it."""
    if (number := _id(text)) is not None:
        return number
    import grp

    try:
        return grp.getgrnam(text).gr_gid
    except (KeyError, ValueError):
        raise ValueError(f"bad group {text!r}: expected a name or a number") from None


def _id(text: str) -> int | None:
    """0 to 2^32 - 2: the last number means "none" to the kernel. None for what is no such number."""
    is_number = re.fullmatch(r"\d{1,10}", text, re.ASCII) is not None and int(text) < (1 << 32) - 1
    return int(text) if is_number else None


def user(text: str) -> User:
    """A user's name, with the groups that the system knows of."""
    import pwd

    if os.geteuid() != 0:
        raise ValueError("only root can become another user")
    try:
        entry = pwd.getpwnam(text)
    except (KeyError, ValueError):
        raise ValueError(f"there is no user {text!r}") from None
    return User(entry.pw_uid, entry.pw_gid, tuple(os.getgrouplist(text, entry.pw_gid)))


def umask(text: str) -> int:
    """Octal, 0 to 777."""
    if not re.fullmatch(r"[0-7]{1,4}", text, re.ASCII) or int(text, 8) > 0o777:
        raise ValueError(f"bad umask {text!r}: expected an octal number such as 022")
    return int(text, 8)


def discards(text: str) -> bool:
    """``unmap`` or ``ignore``."""
    if text not in ("unmap", "ignore"):
        raise ValueError(f"{text!r} is neither unmap nor ignore")
    return text == "unmap"


def uses_io_uring(text: str) -> bool:
    """``io_uring`` or ``threads``."""
    if text not in ("io_uring", "threads"):
        raise ValueError(f"{text!r} is neither io_uring nor threads")
    return text == "io_uring"


def detect_zeroes(text: str) -> DetectZeroes:
    """``off``, ``on`` or ``unmap``."""
    try:
        return DetectZeroes(text)
    except ValueError:
        raise ValueError(f"{text!r} is neither off, on nor unmap") from None
