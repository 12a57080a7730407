"""``qcowfuse-img map``."""

from __future__ import annotations

import sys

from ....printable import printable
from ....tools.extent_map import MapEntry, Storing, map_image
from ...image_names import options_of_names
from ...stopping import run_alone_until_stopped
from ..arguments import Given
from ..exit_codes import ImgExit

_HEADING = f"{'Offset':<15} {'Length':<15} {'Kind':<12} {'Mapped to':<15} File"


def run(given: Given) -> int:
    """Print where the bytes of the disk are, as they are found: the map of a large disk is long."""
    options = options_of_names(given)._replace(force_share=given.force_share, snapshot=given.snapshot)
    write = sys.stdout.write

    async def work() -> int:
        async with map_image(given.image, options) as batches:
            if given.output == "json":
                lines = _JsonLines()
                begin = "["
                async for entries in batches:
                    if entries:
                        write(begin + ",\n".join(map(lines.line, entries)))
                        begin = ",\n"
                write("]\n")
            else:
                begin = _HEADING + "\n"
                async for entries in batches:
                    if entries:
                        write(begin + "\n".join(map(_line, entries)) + "\n")
                        begin = ""
        return ImgExit.OK

    return run_alone_until_stopped(work)


def _line(entry: MapEntry) -> str:
    """A line below :data:`_HEADING`."""
    guest_offset, n_bytes, host_offset, how = entry
    if how.compressed:
        kind = "compressed"
    elif how.data:
        kind = "data, hole" if how.zero else "data"
    else:
        kind = "zero" if how.present else "unallocated"
    place = "" if host_offset is None else f"{host_offset:#x}"
    path = printable(how.path) if how.present else ""
    return f"{guest_offset:<#15x} {n_bytes:<#15x} {kind:<12} {place:<15} {path}".rstrip()


class _JsonLines:
    """The elements of the list that ``qemu-img map --output=json`` prints, each on a line of its own."""

    def __init__(self) -> None:
        self._middles: dict[Storing, str] = {}

    def line(self, entry: MapEntry) -> str:
        """One element. Written by hand: there are numbers and truth values only."""
        guest_offset, n_bytes, host_offset, how = entry
        middle = self._middles.get(how)
        if middle is None:
            values = {"depth": how.depth} | {
                name: str(getattr(how, name)).lower() for name in ("present", "zero", "data", "compressed")
            }
            middle = self._middles[how] = "".join(f', "{name}": {value}' for name, value in values.items())
        place = "" if host_offset is None else f', "offset": {host_offset}'
        return f'{{"start": {guest_offset}, "length": {n_bytes}{middle}{place}}}'
