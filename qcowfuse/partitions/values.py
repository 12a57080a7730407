"""What is found on a disk, as values, and the way in which bytes of it are asked for."""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple, TypeAlias, TypeVar

T = TypeVar("T")
Look: TypeAlias = Generator[tuple[int, int], bytes, T]
"""Yields an offset and a number of bytes, all inside of the disk, is sent these bytes, and returns the result."""


class Partition(NamedTuple):
    """An entry of a table that is in use.

    ``start`` and ``n_bytes`` in bytes. ``type_id``: a GUID, or two hexadecimal digits. ``label`` and ``uuid``: as the
    table has them, not yet printable; empty where there is none. ``is_container``: an extended partition, which only
    holds others. ``problem``: why it can't be used, empty if it can.
    """

    number: int
    start: int
    n_bytes: int
    type_id: str
    type_name: str
    label: str = ""
    uuid: str = ""
    is_bootable: bool = False
    is_container: bool = False
    problem: str = ""

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.start + self.n_bytes

    def with_problem(self, problem: str) -> Partition:
        """The same with one more problem."""
        return self._replace(problem=f"{self.problem}; {problem}" if self.problem else problem)


class PartitionTable(NamedTuple):
    """``kind``: ``gpt``, ``mbr``, or empty where a disk has none. ``problems``: what is wrong with the table itself,
    a line each. ``disk_id``: a GUID, or eight hexadecimal digits."""

    kind: str = ""
    sector_size: int = 512
    disk_id: str = ""
    partitions: tuple[Partition, ...] = ()
    problems: tuple[str, ...] = ()
