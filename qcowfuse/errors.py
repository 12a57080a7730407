"""Every exception that a caller of qcowfuse may see.

1. ``format`` raises :class:`FormatError` (or a subclass) and nothing else, whatever bytes it is given.
2. ``OSError`` from the storage below passes through all layers untouched.
3. A message names the structure, the place, the value found and what was expected; it fits on one line.
"""

from __future__ import annotations

from collections.abc import Iterable


class QcowFuseError(Exception):
    """Base of everything that qcowfuse raises on purpose; ``str()`` of it is one line for a person."""


class FormatError(QcowFuseError):
    """The bytes of an image are wrong.

    ``structure`` is the spec's name of the part ("header", "L2 entry"), ``host_offset`` its place in the
    image file in bytes (None where there is no one place), ``detail`` the value found and what was expected.
    """

    def __init__(self, structure: str, host_offset: int | None, detail: str) -> None:
        self.structure = structure
        self.host_offset = host_offset
        self.detail = detail
        where = "" if host_offset is None else f" at offset {host_offset:#x}"
        super().__init__(f"{structure}{where}: {detail}")


class UnsupportedFeatureError(FormatError):
    """The image is valid but uses features that qcowfuse does not serve; ``names`` says which."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        super().__init__("image", None, "uses what qcowfuse does not support: " + ", ".join(self.names))


class CorruptImageError(FormatError):
    """Metadata read while the image runs is impossible: EIO to the guest, read-only from then on."""


class ImageUsageError(QcowFuseError):
    """The caller asked for something that this image, as it was opened, does not do."""


class WrongKeyError(ImageUsageError):
    """The passphrase opens none of the key slots of an encrypted image."""


class ReadOnlyImageError(ImageUsageError):
    """A write, zero or discard on an image that was opened (or has become) read-only."""


class OutOfRangeError(ImageUsageError):
    """A request reaches past the end of the virtual disk."""


class ImageLockedError(QcowFuseError):
    """Another process holds the image; ``path`` says which image."""

    def __init__(self, path: str, detail: str) -> None:
        self.path = path
        super().__init__(f"{path}: {detail}")


class BackingChainError(QcowFuseError):
    """A backing file or data file cannot be used (missing, a loop, too deep, not a plain path). ``path``: that file,
    or the image that names it."""

    def __init__(self, path: str, detail: str) -> None:
        self.path = path
        super().__init__(f"{path}: {detail}")


class MountError(QcowFuseError):
    """The mount point cannot be used or mounting failed; the message says what to do."""


class StoppedEarlyError(MountError):
    """A signal asked for the end before the mount was ready."""
