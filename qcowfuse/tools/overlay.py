"""Overlays: QCOW2 images that take the writes to the image below them, thrown away in the end or kept.

1. One that is thrown away has no name from its first byte on (``O_TMPFILE``): whatever ends the daemon, SIGKILL and a
   power cut included, nothing is left of it. It is never put into memory unless the user named that folder, or has
   the image there; then the log says so.
2. One that is kept is an ordinary image with a backing file, for QEMU too. It is made under rule 3 of
   :mod:`.new_file`: it is whole when it has a name. One that is there is only used if it belongs to the image: it
   names this very file and its format, and is not smaller.
3. Over an encrypted image it is encrypted. A kept one has the passphrase and the cipher of the image, and makes
   a guess as slow; the key of one that is thrown away is random and in the daemon's memory only.
4. What is written to an overlay may not be read by more than may read the image.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress

import trio

from ..driver.files import ChainFile, ChainFiles
from ..driver.overlay import OverlayBase, OverlayFile
from ..errors import FormatError, ImageUsageError
from ..format.header import Qcow2Header
from ..format.header_fields import CRYPT_NONE, MAX_BACKING_NAME
from ..format.header_parsing import probe_format
from ..format.luks import CipherSpec
from ..storage import file_systems
from ..tables.header import read_header
from .create import CreateOptions, create_image, fill_image
from .create_encryption import Encryption
from .new_file import NO_NAMELESS_FILES, NewFile

_SOME_FOLDER = "--ephemeral=/var/tmp"
_NOT_WRITABLE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_IN_MEMORY = file_systems.MEMORY_FILE_SYSTEMS | {"devtmpfs"}
_DEFAULT_CIPHER = CipherSpec("aes-256", "xts", "plain64")

_log = logging.getLogger(__name__)


class EphemeralOverlay:
    """An overlay without a name in ``folder``, by default that of the image."""

    def __init__(self, folder: str | None = None) -> None:
        self._folder = folder

    async def open(self, files: ChainFiles, base: OverlayBase, passphrase: Callable[[], bytearray]) -> OverlayFile:
        """See Overlay."""
        folder = self._folder
        if folder is None:
            if base.status is not None and stat.S_ISBLK(base.status.st_mode):
                raise ImageUsageError(
                    f"{base.path}: is a block device: name a folder for what is written to the disk: {_SOME_FOLDER}"
                )
            folder = os.path.dirname(os.path.realpath(base.path))
        path = os.path.join(folder, f"overlay of {os.path.basename(base.path)}")
        fd = await trio.to_thread.run_sync(_open_without_name, folder)
        try:
            file_system = file_systems.type_of(fd)
            if file_system in _IN_MEMORY:
                _log.warning(
                    "%s is in memory (%s): what is written to the disk takes memory until it is unmounted",
                    folder,
                    file_system,
                )
            name = os.path.abspath(base.path)
            fits = len(os.fsencode(name)) <= MAX_BACKING_NAME
            await fill_image(
                NewFile(path, fd, is_new=True), base.size, base.cluster_bits, name if fits else None, base.format_name
            )
        except BaseException:
            os.close(fd)
            raise
        file = files.adopt(fd, path)
        if not base.is_encrypted:
            return OverlayFile(file)
        from ..format.crypto import make_sector_cipher

        spec = _DEFAULT_CIPHER if base.luks is None else base.luks.spec
        return OverlayFile(file, make_sector_cipher(spec, secrets.token_bytes(spec.key_bytes)))


def _open_without_name(folder: str) -> int:
    """Raises OSError, with what to do."""
    try:
        return os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError as error:
        text = error.strerror or str(error)
        if error.errno in NO_NAMELESS_FILES:
            text = "the file system there has no files without a name"
        if error.errno in NO_NAMELESS_FILES | _NOT_WRITABLE:
            text += f"; name another folder for what is written to the disk: {_SOME_FOLDER}"
        raise OSError(error.errno, text, folder) from error


class KeptOverlay:
    """The overlay at ``path``, made where there is none unless it is only to be read.

    ``unnamed_format``: what the format of its backing file is, where the overlay does not name one.
    """

    def __init__(self, path: str, *, writable: bool = True, unnamed_format: str | None = None) -> None:
        self._path = path
        self._writable = writable
        self._unnamed_format = unnamed_format

    async def open(self, files: ChainFiles, base: OverlayBase, passphrase: Callable[[], bytearray]) -> OverlayFile:
        """See Overlay."""
        if self._writable and not os.path.lexists(self._path):
            with suppress(FileExistsError):  # somebody else was faster: that one is judged as any other
                await self._create(base, passphrase)
        file = await files.open_overlay(self._path, writable=self._writable)
        try:
            await self._require_belonging(files, file, base)
        except BaseException:
            await file.storage.aclose()
            raise
        return OverlayFile(file)

    async def _create(self, base: OverlayBase, passphrase: Callable[[], bytearray]) -> None:
        encryption = None
        if base.luks is not None:
            iterations = max((slot.iterations for slot in base.luks.slots if slot.active), default=None)
            encryption = Encryption(base.luks.spec, base.luks.hash_name, iterations=iterations)
        elif base.is_encrypted:
            encryption = Encryption(_DEFAULT_CIPHER)
        options = CreateOptions(
            size=base.size,
            cluster_bits=base.cluster_bits,
            backing_file=self._name_of(base),
            backing_format=base.format_name,
            encryption=encryption,
        )
        secret = None if encryption is None else passphrase()
        mode = None if base.status is None else stat.S_IRUSR | stat.S_IWUSR | base.status.st_mode & 0o777
        await create_image(self._path, options, passphrase=secret, mode=mode)

    def _name_of(self, base: OverlayBase) -> str:
        """What the overlay calls the image: seen from its own folder if the image is in there or below."""
        folder = os.path.dirname(self._path)
        for name in _possible_names(folder, base.path):
            try:
                status = os.stat(os.path.join(folder, name))
            except OSError:
                continue
            if base.status is None or os.path.samestat(status, base.status):
                return name
        raise ImageUsageError(f"{self._path}: {base.path} has no name that an overlay could have for it")

    async def _require_belonging(self, files: ChainFiles, file: ChainFile, base: OverlayBase) -> None:
        """Raises ImageUsageError for what is no overlay of this image."""

        def refusal(detail: str) -> ImageUsageError:
            return ImageUsageError(f"{self._path}: {detail}")

        start = bytes(await file.storage.pread(0, min(8, file.storage.size())))
        if probe_format(start) is None:
            raise refusal(f"is no overlay of {base.path}: it is no QCOW image")
        try:
            header = await read_header(file.storage)
        except FormatError as error:
            raise refusal(f"is no overlay of {base.path}: {error}") from error
        if not header.backing_file:
            raise refusal(f"is no overlay of {base.path}: it has no backing file")
        if not await files.is_named(file, header.backing_file, base.path, base.status):
            raise refusal(f"is no overlay of {base.path}: its backing file is {header.backing_file}")
        named_format = header.backing_format if isinstance(header, Qcow2Header) else None
        if named_format is None and self._unnamed_format in ("qcow2", "auto"):
            named_format = base.format_name
        if named_format is None:
            raise refusal("does not say which format its backing file has; --backing-format qcow2 says it")
        if named_format != base.format_name:
            raise refusal(f"takes {base.path} for {named_format}, and it is {base.format_name}")
        if header.virtual_size < base.size:
            raise refusal(f"has a disk of {header.virtual_size} bytes, smaller than the {base.size} of {base.path}")
        if base.is_encrypted and header.crypt_method == CRYPT_NONE:
            raise refusal(
                f"is not encrypted, and {base.path} is: what is written to the disk would be open; "
                f"qcowfuse {self._path} MOUNTPOINT serves it nevertheless"
            )


def _possible_names(folder: str, path: str) -> Iterator[str]:
    """What the file at ``path`` may be called in an image in ``folder``, the best one first."""
    real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    for start, name in ((os.path.abspath(folder or "."), os.path.abspath(path)), (os.path.realpath(folder), real)):
        below = name.removeprefix(start.rstrip("/") + "/")
        if below != name:
            yield f"./{below}" if ":" in below else below
    if not path.startswith(("/dev/fd/", "/proc/")):
        yield os.path.abspath(path)
    yield os.path.realpath(path)
