"""The list after ``-o``: FUSE's options, qcowfuse's own, and what mount(8) and fstab put between them.

1. Commas separate; a backslash makes the next character plain.
2. Own options are those of the table in ``options``, with ``-`` or ``_``. What only concerns mount(8) is accepted and
   means nothing. Anything unknown is refused by name.
3. ``remount`` is refused before anything else: from version 2.41 on mount(8) puts the options that the mount has
   before it, ``user_id=0`` of the kernel among them, and none of those is what the user has to change.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..option_table import Option
from .options import OPTIONS

_KERNEL_FLAGS = frozenset(str.split("nosuid nodev noexec sync dirsync noatime nodiratime"))
_FUSE_FLAGS = frozenset({"allow_other", "allow_root"})
LIST_NAMES = {
    "ro": "do not write to the image",
    "allow_other": "let other users in, as far as file modes let them",
    "allow_root": "let root in, and nobody else",
    "nosuid": "as for any mount; so are nodev, noexec, noatime, nodiratime, sync and dirsync",
}
"""What the list may hold besides options of the table, for documents."""
_MEANINGLESS = frozenset(
    str.split(
        "rw suid dev exec async atime diratime relatime norelatime strictatime nostrictatime lazytime nolazytime "
        "defaults default_permissions auto noauto user nouser users nousers owner group _netdev nofail loud silent "
        "mand nomand iversion noiversion discard nodiscard"
    )
)
_MEANINGLESS_PREFIXES = ("x-", "X-", "comment=", "subtype=")
_OWN = {option.name: option for option in OPTIONS if option.in_list}
_KNOWN = frozenset({"ro", *_FUSE_FLAGS, *_OWN})


class MountOptionError(ValueError):
    """An option that is not accepted; the message names it."""


class GivenOptions:
    """What was said: words for libfuse; flags, values, and those that may come more than once, by long name."""

    def __init__(self) -> None:
        self.fuse: set[str] = set()
        self.flags: set[str] = set()
        self.values: dict[str, str] = {}
        self.repeated: dict[str, list[str]] = {}


def list_words() -> tuple[str, ...]:
    """What may stand in the list, for completion; what takes a value ends with ``=``."""
    own = (f"{option.name}{'=' * bool(option.metavar)}" for option in _OWN.values())
    return tuple(sorted({"ro", *_FUSE_FLAGS, *_KERNEL_FLAGS, *own}))


def split_options(text: str) -> list[str]:
    """``a,b=c\\,d`` as ``["a", "b=c,d"]``; empty parts are dropped."""
    parts, part, plain = [], "", False
    for character in text:
        if plain:
            part, plain = part + character, False
        elif character == "\\":
            plain = True
        elif character == ",":
            parts.append(part)
            part = ""
        else:
            part += character
    return [option for option in (*parts, part) if option]


def with_values_listed(words: Sequence[str]) -> list[str]:
    """A command line with ``-o NAME=VALUE`` for ``--NAME=VALUE`` of the options whose value may be left out: argparse
    knows no such options, or takes the next word for the value."""
    names = {f"--{option.name}" for option in OPTIONS if option.is_optional}
    end = words.index("--") if "--" in words else len(words)
    listed: list[str] = []
    for word in words[:end]:
        name, has_value, value = word.partition("=")
        if has_value and name in names:
            plain = value.replace("\\", "\\\\").replace(",", "\\,")
            listed += ["-o", f"{name.removeprefix('--')}={plain}"]
        else:
            listed.append(word)
    return [*listed, *words[end:]]


def sort_options(lists: Iterable[str]) -> GivenOptions:
    """Sort the options of all the lists; later ones win. Raises MountOptionError."""
    found = GivenOptions()
    options = [option for text in lists for option in split_options(text)]
    if "remount" in options:
        raise MountOptionError("remount is not possible: unmount, then mount with the new options")
    for option in options:
        key, has_value, value = option.partition("=")
        own = key.replace("_", "-")
        if option == "ro":
            found.flags.add("read-only")
        elif option == "rw":
            found.flags.discard("read-only")
        elif option in _KERNEL_FLAGS:
            found.fuse.add(option)
        elif not has_value and key.replace("-", "_") in _FUSE_FLAGS:
            found.fuse.add(key.replace("-", "_"))
        elif option in _MEANINGLESS or option.startswith(_MEANINGLESS_PREFIXES):
            found.fuse.discard("no" + option)
        elif own in _OWN:
            _add(found, _OWN[own], key, value if has_value else None)
        elif key in _FUSE_FLAGS:
            raise MountOptionError(f"option {key} takes no value")
        else:
            from ..near_misses import did_you_mean

            raise MountOptionError(f"unknown option {key}{did_you_mean(key, _KNOWN)}")
    return found


def _add(found: GivenOptions, option: Option, key: str, value: str | None) -> None:
    if not option.metavar:
        if value is not None:
            raise MountOptionError(f"option {key} takes no value")
        found.flags.add(option.name)
    elif option.is_optional and value is None:
        found.values.setdefault(option.name, "")
    elif not value:
        raise MountOptionError(f"option {key} needs a value: {key}=...")
    elif option.is_repeated:
        found.repeated.setdefault(option.name, []).append(value)
    else:
        found.values[option.name] = value
