"""Persistent dirty bitmaps for tests: added by QEMU, read back by QEMU, or by a parser that shares nothing with the
package."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .images import TOP, BuiltImage, run_tool, scratch_folder, write_chain
from .qemu import run

IN_USE = 1
AUTO = 2
_MAX_ENTRIES = 1 << 20
_MAX_DIRECTORY = 1 << 20
_OFFSET = 0x00FF_FFFF_FFFF_FE00

Range = tuple[int, int]


@dataclass(frozen=True)
class StoredBitmap:
    """A bitmap as the image has it; ``dirty`` are the granules whose bits are set."""

    name: str
    flags: int
    granularity: int
    table_offset: int
    table: tuple[int, ...]
    dirty: frozenset[int]

    @property
    def is_valid(self) -> bool:
        """Whether its bits may be trusted."""
        return not self.flags & IN_USE


def bitmap_directory(data: bytes | bytearray) -> Range | None:
    """Place and length of the bitmap directory, None where the image has no bitmaps that mean anything."""
    (version,) = struct.unpack_from(">I", data, 4)
    if version < 3 or not data[95] & 1:
        return None
    (cluster_bits,) = struct.unpack_from(">I", data, 20)
    (position,) = struct.unpack_from(">I", data, 100)
    end = int.from_bytes(data[8:16], "big") or 1 << cluster_bits  # the backing file's name is behind the extensions
    while position + 8 <= end:
        magic, length = struct.unpack_from(">II", data, position)
        if magic == 0x23852875:
            n_bytes, host_offset = struct.unpack_from(">QQ", data, position + 16)
            if n_bytes > _MAX_DIRECTORY or host_offset > len(data):
                raise ValueError(f"bitmap directory of {n_bytes} bytes at {host_offset:#x}")
            return host_offset, n_bytes
        if not magic:
            return None
        position += 8 + (length + 7) // 8 * 8
    return None


def stored_bitmaps(data: bytes | bytearray) -> dict[str, StoredBitmap]:
    """As :func:`all_stored_bitmaps`, by name."""
    return {bitmap.name: bitmap for bitmap in all_stored_bitmaps(data)}


def all_stored_bitmaps(data: bytes | bytearray) -> list[StoredBitmap]:
    """The bitmaps of an image; when it is damaged, several may have one name. None where the autoclear bit says that
    they are stale. Raises ValueError, struct.error for a directory that makes no sense."""
    place = bitmap_directory(data)
    if place is None:
        return []
    (cluster_bits,) = struct.unpack_from(">I", data, 20)
    position, end = place[0], place[0] + place[1]
    found = []
    while position < end:
        table_offset, n_entries, flags, _, bits, n_name, n_extra = struct.unpack_from(">QIIBBHI", data, position)
        if n_entries > _MAX_ENTRIES or table_offset > len(data):
            raise ValueError(f"bitmap with a table of {n_entries} entries at {table_offset:#x}")
        if position + 24 + n_extra + n_name > end:
            raise ValueError(f"entry of the bitmap directory at byte {position - place[0]:#x} is cut short")
        name = bytes(data[position + 24 + n_extra : position + 24 + n_extra + n_name]).decode()
        raw = bytes(data[table_offset : table_offset + 8 * n_entries]).ljust(8 * n_entries, b"\0")
        table = struct.unpack(f">{n_entries}Q", raw)
        dirty = _dirty(data, table, 1 << cluster_bits)
        found.append(StoredBitmap(name, flags, 1 << bits, table_offset, table, frozenset(dirty)))
        position += (24 + n_extra + n_name + 7) // 8 * 8
    return found


def _dirty(data: bytes | bytearray, table: Sequence[int], cluster_size: int) -> Iterable[int]:
    for number, entry in enumerate(table):
        base = number * cluster_size * 8
        if entry == 1:
            yield from range(base, base + cluster_size * 8)
        elif entry:
            stored = bytes(data[entry & _OFFSET : (entry & _OFFSET) + cluster_size]).rstrip(b"\0")
            for index, byte in enumerate(stored):
                if byte:
                    yield from (base + index * 8 + bit for bit in range(8) if byte >> bit & 1)


def add_bitmap(path: str | Path, name: str, granularity: int, *, enabled: bool = True) -> None:
    """``qemu-img bitmap --add``."""
    flag = [] if enabled else ["--disable"]
    run_tool("qemu-img", "bitmap", "-f", "qcow2", "--add", *flag, "-g", str(granularity), str(path), name)


def with_bitmaps(
    built: BuiltImage, bitmaps: Mapping[str, int], *, disabled: Mapping[str, int] | None = None
) -> BuiltImage:
    """The image with bitmaps of the given granularities added by QEMU."""
    with scratch_folder() as folder:
        path = write_chain(folder, built.files)
        for name, granularity in bitmaps.items():
            add_bitmap(path, name, granularity)
        for name, granularity in (disabled or {}).items():
            add_bitmap(path, name, granularity, enabled=False)
        return replace(built, files={**built.files, TOP: Path(path).read_bytes()})


def granules_of(ranges: Iterable[Range], granularity: int) -> set[int]:
    """The granules that ranges of (guest offset, bytes) touch."""
    found: set[int] = set()
    for start, n_bytes in ranges:
        if n_bytes:
            found.update(range(start // granularity, (start + n_bytes - 1) // granularity + 1))
    return found


def qemu_dirty(path: Path, name: str) -> list[Range]:
    """The ranges (start, bytes) that QEMU calls dirty by the bitmap, over NBD as a backup program asks for them."""
    with scratch_folder() as folder:
        socket = f"{folder}/s"
        server = subprocess.Popen(
            ["qemu-nbd", "-t", "-r", "-f", "qcow2", "-B", name, "-k", socket, path], stderr=subprocess.PIPE, text=True
        )
        try:
            while not os.path.exists(socket) and server.poll() is None:
                time.sleep(0.005)
            options = f"driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:{name}"
            mapped = run("qemu-img", "map", "--output=json", "--image-opts", options)
        finally:
            server.terminate()
            said = server.communicate()[1]
    assert mapped.code == 0, f"{mapped.stderr}{said}"
    return [(extent["start"], extent["length"]) for extent in json.loads(mapped.stdout) if not extent["data"]]


def qemu_incremental_backup(path: Path, name: str, target: Path) -> int:
    """Have QEMU copy what is dirty by the bitmap into ``target``, a raw full copy made earlier; the bitmap is clear
    then. Returns the bytes that were copied."""
    server = subprocess.Popen(
        [
            "qemu-storage-daemon",
            *("--blockdev", f"driver=file,node-name=image-file,filename={path}"),
            *("--blockdev", "driver=qcow2,node-name=image,file=image-file"),
            *("--blockdev", f"driver=file,node-name=target-file,filename={target}"),
            *("--blockdev", "driver=raw,node-name=target,file=target-file"),
            *("--chardev", "stdio,id=qmp", "--monitor", "chardev=qmp"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    backup = {"job-id": "j", "device": "image", "target": "target", "sync": "incremental", "bitmap": name}
    for command in ({"execute": "qmp_capabilities"}, {"execute": "blockdev-backup", "arguments": backup}):
        server.stdin.write(json.dumps(command) + "\n")
    server.stdin.flush()
    said: dict[str, Any] = {}
    for line in server.stdout:
        said = json.loads(line)
        if said.get("event") == "BLOCK_JOB_COMPLETED" or "error" in said:
            break
    server.stdin.write(json.dumps({"execute": "quit"}) + "\n")
    server.stdin.close()
    server.stdout.read()
    server.stdout.close()
    assert server.wait(30) == 0
    assert "error" not in said.get("data", {"error": said}), said
    return int(said["data"]["offset"])


def ranges_of(granules: Iterable[int], granularity: int, size: int) -> list[Range]:
    """What :func:`qemu_dirty` gives for a set of granules of a disk of ``size`` bytes."""
    ranges: list[Range] = []
    for granule in sorted(granules):
        start = granule * granularity
        n_bytes = min(granularity, size - start)
        if ranges and ranges[-1][0] + ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + n_bytes)
        else:
            ranges.append((start, n_bytes))
    return ranges
