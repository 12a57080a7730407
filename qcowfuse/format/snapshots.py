"""The snapshot table of a QCOW2 image: entries between bytes and values, both ways.

1. Extra data beyond the fields known here is kept byte for byte, and an entry that lacks the optional fields is
   written without them: the length of its extra data is its own.
2. Names and ids are bytes to the format; undecodable ones become surrogates and come back as they were.
3. The table's own size is stored nowhere: entries are parsed one after the other, each at most
   :data:`MAX_SNAPSHOT_ENTRY` bytes long.

Source: qcow2 specification, "Snapshots".
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

from ..buffer import Buffer
from ..errors import FormatError
from .geometry import WORD_SIZE, round_up
from .header_fields import MAX_L1_SIZE, MAX_SNAPSHOTS, SNAPSHOT_ENTRY_SIZE

MAX_SNAPSHOT_EXTRA = 1024
"""Bytes of extra data in one entry; QEMU's limit."""
MAX_SNAPSHOT_TABLE_SIZE = MAX_SNAPSHOT_EXTRA * MAX_SNAPSHOTS
"""Bytes of the whole table; QEMU's limit."""
MAX_SNAPSHOT_ENTRY = SNAPSHOT_ENTRY_SIZE + MAX_SNAPSHOT_EXTRA + 2 * 0xFFFF + 7
EXPECTED_EXTRA = 16
"""Bytes of extra data that every version 3 entry has: vm_state_size and disk_size in 64 bits."""

_FIXED = struct.Struct(">QIHHIIQII")
_EXTRA = struct.Struct(">QQQ")
WRITTEN_EXTRA = _EXTRA.size
"""Bytes of extra data that each snapshot gets when it is written."""
_N_EXTRA = struct.Struct(">I")
_N_EXTRA_AT = _FIXED.size - _N_EXTRA.size
_NO_ICOUNT = (1 << 64) - 1


class Snapshot(NamedTuple):
    """One entry. ``l1_size`` in entries, ``disk_size`` and ``vm_state_size`` in bytes.

    ``date_sec`` since 1970, ``vm_clock_nsec`` since the guest started. ``disk_size`` and ``icount`` are None where
    the entry has none; ``n_extra`` is the length of its extra data, ``unknown_extra`` the part behind known fields.
    """

    snapshot_id: str
    name: str
    l1_table_offset: int
    l1_size: int
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size: int
    disk_size: int | None
    icount: int | None
    n_extra: int = 24
    unknown_extra: bytes = b""

    @property
    def l1_is_too_large(self) -> bool:
        """Whether the L1 table is beyond the limit that holds for the active one."""
        return self.l1_size * WORD_SIZE > MAX_L1_SIZE


def parse_snapshot(data: Buffer, position: int) -> tuple[Snapshot, int]:
    """The entry at byte ``position`` of ``data``, and where the next one begins.

    ``data`` should hold :data:`MAX_SNAPSHOT_ENTRY` bytes from there on, or all there is; raises FormatError for an
    entry that is cut short or has too much extra data.
    """
    fields, names, names_end, following = _fixed_part(data, position)
    l1_table_offset, l1_size, id_size, _, date_sec, date_nsec, vm_clock_nsec, vm_state_size, n_extra = fields
    extra = bytes(data[names - n_extra : names])
    known = extra[: _EXTRA.size].ljust(_EXTRA.size, b"\0")
    vm_state_size_large, disk_size, icount = _EXTRA.unpack(known)
    snapshot = Snapshot(
        snapshot_id=_decode(data[names : names + id_size]),
        name=_decode(data[names + id_size : names_end]),
        l1_table_offset=l1_table_offset,
        l1_size=l1_size,
        date_sec=date_sec,
        date_nsec=date_nsec,
        vm_clock_nsec=vm_clock_nsec,
        vm_state_size=vm_state_size_large if n_extra >= 8 else vm_state_size,
        disk_size=disk_size if n_extra >= 16 else None,
        icount=icount if n_extra >= 24 and icount != _NO_ICOUNT else None,
        n_extra=n_extra,
        unknown_extra=extra[_EXTRA.size :],
    )
    return snapshot, following


def snapshot_l1_place(data: Buffer, position: int) -> tuple[tuple[int, int], int]:
    """Where the L1 table of the entry lies, its number of entries, and where the next one begins; in a third of the
    time of :func:`parse_snapshot`, and it raises the same."""
    fields, _, _, following = _fixed_part(data, position)
    return (fields[0], fields[1]), following


def end_of_snapshot(data: Buffer, position: int) -> int:
    """Where the entry behind the one at byte ``position`` begins; see :func:`parse_snapshot`."""
    return _fixed_part(data, position)[3]


def lengths_of_snapshot(fixed: Buffer) -> tuple[int, int]:
    """The bytes of an entry's extra data, and of its id and name, whatever they are; ``fixed`` is its beginning,
    SNAPSHOT_ENTRY_SIZE bytes."""
    fields = _FIXED.unpack(fixed)
    return fields[8], fields[2] + fields[3]


def with_extra_length(fixed: bytes, n_extra: int) -> bytes:
    """``fixed``, the beginning of an entry, with another number of bytes of extra data."""
    return fixed[:_N_EXTRA_AT] + _N_EXTRA.pack(n_extra)


def _fixed_part(data: Buffer, position: int) -> tuple[tuple[int, ...], int, int, int]:
    """The fixed fields of an entry, start and end of its names, and where the next one begins."""
    start = position + _FIXED.size
    if start > len(data):
        raise _error(position, f"{len(data) - position} bytes, expected at least {_FIXED.size}")
    fields = _FIXED.unpack_from(data, position)
    n_extra = fields[8]
    if n_extra > MAX_SNAPSHOT_EXTRA:
        raise _error(position, f"extra data of {n_extra} bytes, expected at most {MAX_SNAPSHOT_EXTRA}")
    names = start + n_extra
    end = names + fields[2] + fields[3]
    if end > len(data):
        raise _error(position, f"{len(data) - position} bytes, expected {end - position}")
    return fields, names, end, position + round_up(end - position, 8)


def serialise_snapshots(snapshots: Iterable[Snapshot]) -> bytes:
    """The bytes of a table, each entry padded to 8 bytes. Raises FormatError for what no entry can say."""
    parts: list[bytes] = []
    for snapshot in snapshots:
        snapshot_id, name = _encode(snapshot.snapshot_id), _encode(snapshot.name)
        if max(len(snapshot_id), len(name)) > 0xFFFF:
            raise _error(None, f"id of {len(snapshot_id)} and name of {len(name)} bytes, expected at most 65535")
        extra = _EXTRA.pack(
            snapshot.vm_state_size,
            snapshot.disk_size or 0,
            _NO_ICOUNT if snapshot.icount is None else snapshot.icount,
        )
        extra = (extra + snapshot.unknown_extra)[: snapshot.n_extra]
        if len(extra) != snapshot.n_extra or snapshot.n_extra > MAX_SNAPSHOT_EXTRA:
            raise _error(None, f"extra data of {snapshot.n_extra} bytes, expected {len(extra)}")
        fits = snapshot.vm_state_size < 1 << 32
        fixed = _FIXED.pack(
            snapshot.l1_table_offset,
            snapshot.l1_size,
            len(snapshot_id),
            len(name),
            snapshot.date_sec,
            snapshot.date_nsec,
            snapshot.vm_clock_nsec,
            snapshot.vm_state_size if fits else 0,
            snapshot.n_extra,
        )
        entry = fixed + extra + snapshot_id + name
        parts.append(entry + bytes(-len(entry) % 8))
    return b"".join(parts)


def _decode(raw: Buffer) -> str:
    # C strings to QEMU: what is behind a NUL is not looked at, and lost when the table is written again.
    return bytes(raw).partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _error(position: int | None, detail: str) -> FormatError:
    where = "" if position is None else f" at byte {position:#x} of the table"
    return FormatError("snapshot table entry", None, detail + where)
