"""A file that nobody opens again: nothing of it needs to be durable, but what is written must be there to be read.

A flush waits for no disk. It only asks whether the kernel has lost something that it had taken: that is final here as
for any other file. A write that finds no room fails at once: file systems that delay allocation reserve the space.

Source: sync_file_range(2), which tells of errors since the last call as fsync(2) does.
"""

from __future__ import annotations

from .file import FileStorage
from .syscalls import written_back_without_error


class ThrowAwayFile(FileStorage):
    """A FileStorage without durability."""

    def try_flush(self) -> bool:
        """See Storage: it never waits."""
        return self.durability.try_at_once(written_back_without_error, self.fileno())

    async def flush(self) -> None:
        """See above. Raises OSError; after one failure every later call fails with the same errno."""
        self.durability.at_once(written_back_without_error, self.fileno())
