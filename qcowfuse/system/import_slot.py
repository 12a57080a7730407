"""Where a loaded shared object keeps the address of a function that it imports, and how to divert it for a while.

1. Nothing is read from memory that the process's own map does not show as readable; nothing is written before
   all that leads to it has been verified. A surprise is a :class:`SlotError`, and then nothing was changed.
2. Only 64-bit little-endian ELF with RELA relocations, on the machines listed here.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

_RELOCATIONS_OF_SLOTS = {"x86_64": {6, 7}, "aarch64": {1025, 1026}}
"""GLOB_DAT and JUMP_SLOT by machine."""
_RTLD_DI_LINKMAP = 2
_DT_STRTAB, _DT_STRSZ, _DT_SYMTAB, _DT_RELA, _DT_RELASZ, _DT_JMPREL, _DT_PLTRELSZ = 5, 10, 6, 7, 8, 23, 2
_N_DYNAMIC_MAX = 512
_SYMBOL_BYTES, _RELA_BYTES, _DYNAMIC_BYTES = 24, 24, 16


class SlotError(Exception):
    """The slot was not found where it must be, or could not be written."""


class _Region(NamedTuple):
    start: int
    end: int
    access: str
    path: str


class _LinkMap(ctypes.Structure):
    _fields_ = (("base", ctypes.c_size_t), ("name", ctypes.c_char_p), ("dynamic", ctypes.c_size_t))


class LoadedObject:
    """A shared object in this process; ``library`` is what dlopen (``ctypes.CDLL``) gave for it.

    Raises SlotError where machine, C library or layout are not what this module knows.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        machine = os.uname().machine
        if machine not in _RELOCATIONS_OF_SLOTS or sys.byteorder != "little" or sys.maxsize < 1 << 32:
            raise SlotError(f"machine {machine} is not known")
        self._slot_types = _RELOCATIONS_OF_SLOTS[machine]
        self._regions: list[_Region] = []
        link = ctypes.POINTER(_LinkMap)()
        try:
            dlinfo = ctypes.CDLL(None).dlinfo
        except AttributeError:
            raise SlotError("the C library has no dlinfo") from None
        dlinfo.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        if dlinfo(library._handle, _RTLD_DI_LINKMAP, ctypes.byref(link)) or not link:
            raise SlotError("dlinfo does not know the module")
        self._base = link.contents.base
        if self._read(self._base, 6) != b"\x7fELF\x02\x01":
            raise SlotError("not a 64-bit little-endian ELF object")
        self._tags = self._read_dynamic(link.contents.dynamic)

    @classmethod
    def holding(cls, address: int) -> LoadedObject:
        """The shared object that the code or data at ``address`` belongs to. Raises SlotError, OSError."""
        region = _region_at(address)
        if region is not None and region.path.startswith("/"):
            return cls(ctypes.CDLL(region.path))
        raise SlotError(f"address {address:#x} is in no shared object")

    def slot_of(self, names: Iterable[str]) -> tuple[str, int]:
        """The one imported function out of ``names`` and the address of its slot. Raises SlotError."""
        wanted = set(names)
        found = [(name, slot) for name, slot in self._imports() if name in wanted]
        if len(found) != 1:
            raise SlotError(f"expected one reference to {'/'.join(sorted(wanted))}, found {len(found)}")
        return found[0]

    def _imports(self) -> Iterator[tuple[str, int]]:
        strings = self._read(self._address(_DT_STRTAB), self._tags.get(_DT_STRSZ, 0))
        for table_tag, size_tag in ((_DT_JMPREL, _DT_PLTRELSZ), (_DT_RELA, _DT_RELASZ)):
            if table_tag not in self._tags:
                continue
            table = self._read(self._address(table_tag), self._tags[size_tag])
            if len(table) % _RELA_BYTES:
                raise SlotError("relocation table of an odd size")
            slots = [
                (info >> 32, self._base + offset)
                for offset, info, addend in struct.iter_unpack("<QQq", table)
                if info & 0xFFFFFFFF in self._slot_types and addend == 0
            ]
            n_symbols = 1 + max((index for index, _ in slots), default=0)
            symbols = self._read(self._address(_DT_SYMTAB), n_symbols * _SYMBOL_BYTES)
            for index, slot in slots:
                start = int.from_bytes(symbols[index * _SYMBOL_BYTES : index * _SYMBOL_BYTES + 4], "little")
                yield strings[start : strings.find(b"\0", start)].decode("ascii", "replace"), slot

    def _address(self, tag: int) -> int:
        """glibc turns the addresses in the dynamic section into absolute ones, other loaders do not."""
        if tag not in self._tags:
            raise SlotError(f"no entry {tag} in the dynamic section")
        value = self._tags[tag]
        return value if value >= self._base else value + self._base

    def _read_dynamic(self, address: int) -> dict[int, int]:
        tags: dict[int, int] = {}
        for index in range(_N_DYNAMIC_MAX):
            tag, value = struct.unpack("<qQ", self._read(address + index * _DYNAMIC_BYTES, _DYNAMIC_BYTES))
            if tag == 0:
                return tags
            tags[tag] = value
        raise SlotError("the dynamic section does not end")

    def _region_of(self, address: int) -> _Region:
        for region in self._regions:
            if region.start <= address < region.end:
                return region
        found = _region_at(address)
        if found is None:
            raise SlotError(f"address {address:#x} is not mapped")
        self._regions.append(found)
        return found

    def _read(self, address: int, n_bytes: int) -> bytes:
        position = address
        while position < address + n_bytes:
            region = self._region_of(position)
            if "r" not in region.access:
                raise SlotError(f"address {position:#x} is not readable")
            position = region.end
        return ctypes.string_at(address, n_bytes)


@contextmanager
def diverted(slot: int, target: int) -> Iterator[None]:
    """Let the slot hold ``target`` inside of the block. Raises SlotError before the block, never after it."""
    previous = _exchange(slot, target)
    try:
        yield
    finally:
        _exchange(slot, previous)


def _region_at(address: int) -> _Region | None:
    """The memory that has ``address`` in it, as the process's own map shows it now. Raises OSError."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace", newline="\n") as maps:
        for line in maps:
            start, _, rest = line.partition("-")
            end, _, rest = rest.partition(" ")
            if int(start, 16) <= address < int(end, 16):
                access, _, _, _, *path = rest.rstrip("\n").split(maxsplit=4)
                return _Region(int(start, 16), int(end, 16), access, path[0] if path else "")
    return None


def _exchange(slot: int, value: int) -> int:
    region = _region_at(slot)
    if region is None or slot % ctypes.sizeof(ctypes.c_size_t) or "r" not in region.access:
        raise SlotError("the slot is not where it should be")
    read_only = "w" not in region.access  # full RELRO
    if read_only:
        _protect(slot, mmap.PROT_READ | mmap.PROT_WRITE)
    memory = ctypes.c_size_t.from_address(slot)
    previous, memory.value = memory.value, value
    if read_only:
        _protect(slot, mmap.PROT_READ)
    return previous


def _protect(address: int, access: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    page = address & ~(mmap.PAGESIZE - 1)
    if libc.mprotect(page, mmap.PAGESIZE, access):
        raise SlotError(f"mprotect: {os.strerror(ctypes.get_errno())}")
