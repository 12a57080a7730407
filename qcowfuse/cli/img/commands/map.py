"""``qcowfuse-img map``."""

from __future__ import annotations

import json
import sys
from typing import Any

from ....printable import printable
from ....tools.extent_map import MapEntry, map_image
from ...image_names import options_of_names
from ...stopping import run_alone_until_stopped
from ..arguments import Given
from ..exit_codes import ImgExit


def run(given: Given) -> int:
    """Print which extent of the disk lies where."""
    names = options_of_names(given)

    async def work() -> int:
        n_entries = 0
        options = names._replace(force_share=given.force_share, snapshot=given.snapshot)
        async with map_image(given.image, options) as entries:
            async for entry in entries:
                if given.output == "json":
                    # One line each, printed as found: the map of a large disk is long.
                    sys.stdout.write(("[" if not n_entries else ",\n") + json.dumps(_as_json(entry)))
                else:
                    if not n_entries:
                        print(_HEADING)
                    print(_line(entry))
                n_entries += 1
        if given.output == "json":
            print("]")
        return ImgExit.OK

    return run_alone_until_stopped(work)


_HEADING = f"{'Offset':<15} {'Length':<15} {'Kind':<12} {'Mapped to':<15} File"


def _line(entry: MapEntry) -> str:
    """A line below :data:`_HEADING`."""
    if entry.compressed:
        kind = "compressed"
    elif entry.data:
        kind = "data, hole" if entry.zero else "data"
    else:
        kind = "zero" if entry.present else "unallocated"
    place = "" if entry.host_offset is None else f"{entry.host_offset:#x}"
    path = printable(entry.path) if entry.present else ""
    return f"{entry.guest_offset:<#15x} {entry.n_bytes:<#15x} {kind:<12} {place:<15} {path}".rstrip()


def _as_json(entry: MapEntry) -> dict[str, Any]:
    """One element of the list that ``qemu-img map --output=json`` prints."""
    found: dict[str, Any] = {
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
