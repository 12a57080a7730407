"""What qcowfuse-img prints: the JSON of qemu-img, field by field, and text for people.

Names from inside an image may hold anything: JSON escapes what it must, text shows the unprintable as ``?``.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from datetime import datetime
from typing import Any

from ...consistency.result import CheckResult
from ...printable import printable
from ...tools.extent_map import MapEntry
from ...tools.info import AUTO, IN_USE, BitmapEntry, Description, LuksHeader, Snapshot
from ..json_text import as_unicode
from ..size_text import size_text

Json = dict[str, Any]


def info_json(described: Description) -> Json:
    """For :func:`~qcowfuse.cli.json_text.write_json`: the object that ``qemu-img info --output=json`` prints."""
    info = described.info
    protocol = "host_device" if info.is_block_device else "file"
    child: Json = {
        "children": [],
        "virtual-size": -(-info.file_length // 512) * 512,
        "filename": info.path,
        "format": protocol,
        "actual-size": info.actual_size,
        "format-specific": {"type": "file", "data": {}},
        "dirty-flag": False,
    }
    found: Json = {
        "children": [{"name": "file", "info": child}],
        "virtual-size": info.virtual_size,
        "filename": info.path,
        "cluster-size": info.cluster_size,
        "format": info.format_name,
        "actual-size": info.actual_size,
        "dirty-flag": info.dirty,
    }
    if info.encryption is not None:
        found["encrypted"] = True
    if info.backing_file is not None:
        found["backing-filename"] = info.backing_file
        found["full-backing-filename"] = info.full_backing_file
        if info.backing_format is not None:
            found["backing-filename-format"] = info.backing_format
    if info.n_snapshots:
        found["snapshots"] = snapshots_json(described.snapshots())
    if info.format_name == "qcow2":
        found["format-specific"] = {"type": "qcow2", "data": _specific(described)}
    return found


def _specific(described: Description) -> Json:
    info = described.info
    data: Json = {
        "compat": "1.1" if info.version >= 3 else "0.10",
        "compression-type": info.compression,
        "refcount-bits": info.refcount_bits,
    }
    if info.version >= 3:
        data["lazy-refcounts"] = info.lazy_refcounts
        data["corrupt"] = info.corrupt
        data["extended-l2"] = info.extended_l2
    if info.n_bitmaps:
        data["bitmaps"] = _bitmaps_json(described.bitmaps())
    if info.data_file is not None:
        data["data-file"] = info.data_file
    if info.data_file_raw is not None:
        data["data-file-raw"] = info.data_file_raw
    if info.encryption is not None:
        data["encrypt"] = {"format": info.encryption} if info.luks is None else _luks_json(info.luks)
    return data


async def _bitmaps_json(bitmaps: AsyncGenerator[BitmapEntry]) -> AsyncGenerator[Json]:
    async with aclosing(bitmaps):
        async for bitmap in bitmaps:
            yield {
                "flags": [name for bit, name in ((IN_USE, "in-use"), (AUTO, "auto")) if bitmap.flags & bit],
                "name": bitmap.name,
                "granularity": bitmap.granularity,
            }


async def snapshots_json(snapshots: AsyncGenerator[Snapshot]) -> AsyncGenerator[Json]:
    """For :func:`~qcowfuse.cli.json_text.write_json`: the ``snapshots`` of ``qemu-img info --output=json``."""
    async with aclosing(snapshots):
        async for snapshot in snapshots:
            yield _snapshot_json(snapshot)


def _snapshot_json(snapshot: Snapshot) -> Json:
    found: Json = {
        "id": snapshot.snapshot_id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date_sec,
        "date-nsec": snapshot.date_nsec,
        "vm-clock-sec": snapshot.vm_clock_nsec // 1_000_000_000,
        "vm-clock-nsec": snapshot.vm_clock_nsec % 1_000_000_000,
    }
    if snapshot.icount is not None:
        found["icount"] = snapshot.icount
    return found


def _luks_json(luks: LuksHeader) -> Json:
    found: Json = {
        "format": "luks",
        "cipher-alg": luks.spec.cipher,
        "cipher-mode": luks.spec.mode,
        "ivgen-alg": luks.spec.iv_generator,
        "hash-alg": luks.hash_name,
        "detached-header": False,
        "payload-offset": luks.payload_offset,
        "master-key-iters": luks.digest_iterations,
        "uuid": luks.uuid,
        "slots": [
            {"active": slot.active, "key-offset": slot.key_offset}
            | ({"iters": slot.iterations, "stripes": slot.stripes} if slot.active else {})
            for slot in luks.slots
        ],
    }
    if luks.spec.iv_generator == "essiv":
        found["ivgen-hash-alg"] = luks.spec.iv_hash
    return found


def map_json(entry: MapEntry) -> Json:
    """One element of the list that ``qemu-img map --output=json`` prints."""
    found: Json = {
        "start": entry.guest_offset,
        "length": entry.n_bytes,
        "depth": entry.depth,
        "present": entry.present,
        "zero": entry.zero,
        "data": entry.data,
        "compressed": entry.compressed,
    }
    if entry.host_offset is not None:
        found["offset"] = entry.host_offset
    return found


def check_json(path: str, result: CheckResult) -> Json:
    """The object that ``qemu-img check --output=json`` prints: counts of 0 are left out, but for errors."""
    found: Json = {"filename": path, "format": "qcow2", "check-errors": result.check_errors}
    counts = {
        "image-end-offset": result.image_end_offset,
        "corruptions": result.corruptions,
        "leaks": result.leaks,
        "leaks-fixed": result.leaks_fixed,
        "corruptions-fixed": result.corruptions_fixed,
        "total-clusters": result.total_clusters,
        "allocated-clusters": result.allocated_clusters,
        "fragmented-clusters": result.fragmented_clusters,
        "compressed-clusters": result.compressed_clusters,
    }
    return found | {name: count for name, count in counts.items() if count}


def to_text(value: Json | list[Json]) -> str:
    """JSON as qemu-img lays it out."""
    return json.dumps(as_unicode(value), indent=4)


async def write_info(described: Description, write: Callable[[str], object]) -> None:
    """The text of ``info``, of which ``write`` gets line by line."""
    info = described.info
    write(f"image: {printable(info.path)}")
    write(f"file format: {info.format_name}")
    write(f"virtual size: {size_text(info.virtual_size)} ({info.virtual_size} bytes)")
    write(f"disk size: {size_text(info.actual_size)}")
    if info.encryption is not None:
        write(f"encrypted: {info.encryption}")
    write(f"cluster_size: {info.cluster_size}")
    if info.dirty:
        write("cleanly shut down: no")
    if info.backing_file is not None:
        actual = "" if info.full_backing_file == info.backing_file else f" (actual path: {info.full_backing_file})"
        write(printable(f"backing file: {info.backing_file}{actual}"))
        if info.backing_format is not None:
            write(f"backing file format: {printable(info.backing_format)}")
    if info.n_snapshots:
        write("Snapshot list:")
        write(SNAPSHOT_HEADING)
        async with aclosing(described.snapshots()) as snapshots:
            async for snapshot in snapshots:
                write(snapshot_line(snapshot))
    if info.format_name == "qcow2":
        write("Format specific information:")
        await _write_nested(_specific(described), 1, write)
    write(f"file length: {size_text(info.file_length)} ({info.file_length} bytes)")


async def _write_nested(data: Mapping[str, Any], depth: int, write: Callable[[str], object]) -> None:
    indent = "    " * depth
    for name, value in data.items():
        label = name.replace("-", " ")
        if isinstance(value, bool):
            write(f"{indent}{label}: {str(value).lower()}")
        elif isinstance(value, dict):
            write(f"{indent}{label}:")
            await _write_nested(value, depth + 1, write)
        elif isinstance(value, list):
            write(f"{indent}{label}:")
            for number, item in enumerate(value):
                write(printable(f"{indent}    {_slot_text(number, item)}"))
        elif isinstance(value, AsyncGenerator):
            write(f"{indent}{label}:")
            async with aclosing(value) as items:
                async for item in items:
                    write(printable(f"{indent}    {_bitmap_text(item)}"))
        else:
            write(f"{indent}{label}: {printable(str(value))}")


def _bitmap_text(bitmap: Json) -> str:
    flags = ", ".join(bitmap["flags"]) or "none"
    return f"{bitmap['name']}: granularity {bitmap['granularity']}, flags {flags}"


def _slot_text(number: int, slot: Json) -> str:
    if not slot["active"]:
        return f"{number}: not in use, key offset {slot['key-offset']}"
    return f"{number}: in use, key offset {slot['key-offset']}, {slot['iters']} iterations, {slot['stripes']} stripes"


SNAPSHOT_HEADING = f"{'ID':<8}{'TAG':<16}{'VM_SIZE':>10}{'DATE':>21}{'VM_CLOCK':>16}"


def snapshot_line(snapshot: Snapshot) -> str:
    """A line below :data:`SNAPSHOT_HEADING`."""
    try:
        date = datetime.fromtimestamp(snapshot.date_sec).isoformat(" ")
    except (OverflowError, OSError, ValueError):
        date = "?"
    seconds, milliseconds = divmod(snapshot.vm_clock_nsec // 1_000_000, 1000)
    clock = f"{seconds // 3600:04}:{seconds // 60 % 60:02}:{seconds % 60:02}.{milliseconds:03}"
    name, snapshot_id = printable(snapshot.name), printable(snapshot.snapshot_id)
    return f"{snapshot_id:<7} {name:<15} {size_text(snapshot.vm_state_size):>9} {date:>20} {clock:>15}"


MAP_HEADING = f"{'Offset':<15} {'Length':<15} {'Kind':<12} {'Mapped to':<15} File"


def map_line(entry: MapEntry) -> str:
    """A line below :data:`MAP_HEADING`."""
    if entry.compressed:
        kind = "compressed"
    elif entry.data:
        kind = "data, hole" if entry.zero else "data"
    else:
        kind = "zero" if entry.present else "unallocated"
    place = "" if entry.host_offset is None else f"{entry.host_offset:#x}"
    path = printable(entry.path) if entry.present else ""
    return f"{entry.guest_offset:<#15x} {entry.n_bytes:<#15x} {kind:<12} {place:<15} {path}".rstrip()


def check_lines(result: CheckResult) -> Iterable[str]:
    """The text of ``check``, after the findings."""
    if result.leaks_fixed or result.corruptions_fixed:
        yield f"Repaired: {result.leaks_fixed} leaked clusters, {result.corruptions_fixed} errors. Checked again:"
    if not (result.corruptions or result.leaks or result.check_errors):
        yield "No errors were found on the image."
    if result.corruptions:
        yield f"{result.corruptions} errors were found on the image: data may be lost."
    if result.leaks:
        yield f"{result.leaks} leaked clusters were found: space is wasted, but no data is harmed."
    if result.check_errors:
        yield f"{result.check_errors} internal errors have occurred during the check."
    if result.total_clusters and result.allocated_clusters:
        yield (
            f"{result.allocated_clusters}/{result.total_clusters} = "
            f"{100 * result.allocated_clusters / result.total_clusters:.2f}% allocated, "
            f"{100 * result.fragmented_clusters / result.allocated_clusters:.2f}% fragmented, "
            f"{100 * result.compressed_clusters / result.allocated_clusters:.2f}% compressed clusters"
        )
    yield f"Image end offset: {result.image_end_offset}"
