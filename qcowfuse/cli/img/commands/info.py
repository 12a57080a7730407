"""``qcowfuse-img info``: the JSON of qemu-img, field by field, and text for people.

Names from inside an image may hold anything: JSON escapes what it must, text shows the unprintable as ``?``.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from ....printable import printable
from ....tools.info import AUTO, IN_USE, BitmapEntry, Description, describing
from ...size_text import size_text
from ...stopping import run_alone_until_stopped
from ..arguments import Given
from ..exit_codes import ImgExit

if TYPE_CHECKING:
    from ....tools.info import LuksHeader

Json = dict[str, Any]


def run(given: Given) -> int:
    """Print what the image says about itself."""

    async def work() -> int:
        async with describing(given.image, force_share=given.force_share) as described:
            if given.output == "json":
                from ...json_text import write_json

                await write_json(_info_json(described), sys.stdout.write)
                print()
            else:
                await _write_info(described, print)
        return ImgExit.OK

    return run_alone_until_stopped(work)


def _info_json(described: Description) -> Json:
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
        from ..snapshot_text import snapshots_json

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


async def _write_info(described: Description, write: Callable[[str], object]) -> None:
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
        from ..snapshot_text import SNAPSHOT_HEADING, snapshot_line

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
