"""copy_file_range(2) between files of one mount, or within one: no request for each piece, and holes stay holes.

1. What reads as zeroes at the source is not read. The same bytes of the target become zeroes as if a hole were
   punched there: where nothing was stored, nothing is, and whole clusters may give their space back.
2. While the kernel waits for the answer it keeps the target locked. So one request copies :data:`MOST_DATA` at most,
   looks after each piece whether its caller got a signal, and answers with what it has copied: the caller asks again.
3. What reaches past the end of either disk is left to the kernel's own way, by reads and writes: EOPNOTSUPP. What
   such a write does is in :mod:`.sizes`.
4. Two files may share bytes (a disk and its partitions). Where the source lies in the target, pieces are read and
   written one after the other, as by a program that copies.
5. Before it asks, the kernel has the dirty pages of both ranges written. From the target it drops the pages of what
   was copied. It knows nothing of a piece that failed halfway: then it is made to forget all of them.

Source: fuse_copy_file_range in the kernel's fs/fuse/file.c, copy_file_range(2).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NoReturn

import trio
from pyfuse3 import FUSEError

from ..driver.image import Image
from .sizes import Sizes

PIECE = 1 << 20
"""Bytes of data read and written at once; pieces end at multiples of it in the target."""
MOST_DATA = 16 << 20
"""Bytes of data that one request copies."""
_MOST_ZEROES = 1 << 30


class Copies:
    """Copies into ``image``, the file whose size ``sizes`` knows. ``slow`` surrounds what waits, ``fail`` raises the
    FUSEError for an exception; ``on_write`` and ``on_zeroes`` are told of changes."""

    def __init__(
        self,
        image: Image,
        sizes: Sizes,
        slow: Callable[[], AbstractContextManager[None]],
        fail: Callable[[str, Exception], NoReturn],
        on_write: Callable[[], None],
        on_zeroes: Callable[[], None],
    ) -> None:
        self._image = image
        self._sizes = sizes
        self._slow = slow
        self._fail = fail
        self._on_write = on_write
        self._on_zeroes = on_zeroes

    async def copy_from(
        self,
        source: Copies,
        source_off: int,
        off: int,
        n_bytes: int,
        flags: int,
        is_interrupted: Callable[[], bool],
    ) -> int:
        """Copy up to ``n_bytes`` of ``source`` to ``off``; how many were copied, 1 or more. Raises FUSEError."""
        try:
            if flags or min(source_off, off) < 0:
                raise FUSEError(errno.EINVAL)
            if self._image.read_only:
                raise FUSEError(errno.EROFS)
            n_bytes = min(n_bytes, source._image.size - source_off, self._image.size - off)
            if n_bytes <= 0:
                raise FUSEError(errno.EOPNOTSUPP)
            with self._slow():
                return await self._copy(source._image, source_off, off, n_bytes, is_interrupted)
        except Exception as exc:
            self._fail("copy_file_range", exc)

    async def _copy(
        self, source: Image, source_off: int, off: int, n_bytes: int, is_interrupted: Callable[[], bool]
    ) -> int:
        target = self._image
        n_done = n_data = 0
        try:
            while n_done < n_bytes and n_data < MOST_DATA and not (n_done and is_interrupted()):
                await trio.lowlevel.checkpoint()
                is_data, n_piece = await source.find_extent(source_off + n_done, n_bytes - n_done)
                if is_data:
                    n_piece = min(n_piece, PIECE - (off + n_done) % PIECE)
                    await target.write(off + n_done, await source.read(source_off + n_done, n_piece))
                    n_data += n_piece
                    self._on_write()
                else:
                    n_piece = min(n_piece, _MOST_ZEROES)
                    await target.write_zeroes(off + n_done, n_piece, unmap=True)
                    self._on_zeroes()
                n_done += n_piece
        except BaseException as exc:
            self._on_write()
            self._sizes.is_wrong(forgets=True)  # rule 5
            if not n_done or not isinstance(exc, Exception):
                raise
            # The caller asks again for the rest, and hears of it then.
        return n_done
