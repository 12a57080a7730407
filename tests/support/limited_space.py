"""LimitedStorage: a MemoryStorage on a file system that has blocks, holes, and an end of its space.

1. Blocks of ``block_size`` that hold only zeroes at first are holes, as after ``cp --sparse=always``.
2. A write, or allocate, takes a block of :class:`Room` for each hole that it touches; where there is none left the
   part before that is written and ENOSPC raised. A hole that is punched gives whole blocks back.
3. ``copy_on_write``: what was durable costs a block to overwrite, once between two flushes, which give it back.
   Blocks can be kept free for that.
4. Without ``has_fallocate`` nothing can be set aside.
"""

from __future__ import annotations

import errno
import os

from qcowfuse.buffer import Buffer

from .memory_storage import MemoryStorage


class Room:
    """Blocks that a file system still has; ``limit`` None: as many as are asked for. ``n_taken`` counts them all."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.n_taken = 0

    def take(self) -> bool:
        """Take a block if there is one."""
        if self.limit is not None:
            if self.limit <= 0:
                return False
            self.limit -= 1
        self.n_taken += 1
        return True

    def give_back(self, n_blocks: int) -> None:
        """Blocks are free again."""
        if self.limit is not None:
            self.limit += n_blocks


class LimitedStorage(MemoryStorage):
    """See the module docstring."""

    def __init__(
        self,
        data: Buffer,
        room: Room,
        *,
        block_size: int = 512,
        has_fallocate: bool = True,
        copy_on_write: bool = False,
        suspend: bool = False,
        name: str = "limited",
    ) -> None:
        super().__init__(data, suspend=suspend, name=name)
        self.room = room
        self.block_size = block_size
        self.has_fallocate = has_fallocate
        self.copy_on_write = copy_on_write
        self.n_failures = 0
        blocks = range(0, len(self.data), block_size)
        self._blocks = {start // block_size for start in blocks if any(self.data[start : start + block_size])}
        self._replaced: set[int] = set()
        self._fresh: set[int] = set()
        self.n_kept = 0

    async def punch_hole(self, host_offset: int, n_bytes: int, *, in_use: bool = False) -> None:
        """Zero, and give whole blocks back."""
        await super().punch_hole(host_offset, n_bytes, in_use=in_use)
        first, end = -(-host_offset // self.block_size), (host_offset + n_bytes) // self.block_size
        freed = self._blocks.intersection(range(first, end))
        self._blocks -= freed
        self._fresh -= freed
        self.room.give_back(len(freed))

    async def write_zeroes(self, host_offset: int, n_bytes: int, *, unmap: bool = False) -> None:
        """Zeroes, or with ``unmap`` a hole."""
        if unmap:
            await self.punch_hole(host_offset, n_bytes)
        else:
            await super().write_zeroes(host_offset, n_bytes)

    async def allocate(self, host_offset: int, n_bytes: int) -> bool:
        """Take what the range lacks."""
        if not self.has_fallocate:
            return False
        await self._checkpoint()
        if self._make_room(host_offset, n_bytes, overwrites=False) < n_bytes:
            self._raise_full()
        return await super().allocate(host_offset, n_bytes)

    async def keep_free(self, n_bytes: int) -> bool:
        """Take blocks, or give back those that were taken."""
        if not self.copy_on_write:
            return False
        await self._checkpoint()
        self.room.give_back(self.n_kept)
        self.n_kept = 0
        n_blocks = n_bytes // self.block_size
        if self.room.limit is not None:
            if self.room.limit < n_blocks:
                self._raise_full()
            self.room.limit -= n_blocks
        self.n_kept = n_blocks
        return True

    def try_flush(self) -> bool:
        """What was overwritten until now is given back."""
        if not super().try_flush():
            return False
        self._give_back_replaced()
        return True

    async def flush(self) -> None:
        """What was overwritten until now is given back."""
        await super().flush()
        self._give_back_replaced()

    def _give_back_replaced(self) -> None:
        self.room.give_back(len(self._replaced))
        self._replaced.clear()
        self._fresh.clear()

    def _write(self, host_offset: int, data: bytes) -> None:
        n_bytes = self._make_room(host_offset, len(data), overwrites=True)
        super()._write(host_offset, data[:n_bytes])
        if n_bytes < len(data):
            self._raise_full()

    def _make_room(self, host_offset: int, n_bytes: int, *, overwrites: bool) -> int:
        """How many bytes of the range have their blocks now."""
        for block in range(host_offset // self.block_size, -(-(host_offset + n_bytes) // self.block_size)):
            if block not in self._blocks:
                if not self.room.take():
                    return max(0, block * self.block_size - host_offset)
                self._blocks.add(block)
                self._fresh.add(block)
            elif overwrites and self.copy_on_write and block not in self._fresh and block not in self._replaced:
                if not self.room.take():
                    return max(0, block * self.block_size - host_offset)
                self._replaced.add(block)
        return n_bytes

    def _raise_full(self) -> None:
        self.n_failures += 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)
