"""The listing of ``qcowfuse-img partitions``: the table of a disk, its partitions and what is in them.

qemu-img has nothing like it; the names in the JSON are written as qemu-img writes its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from ....driver.chain import open_image
from ....driver.image import Image
from ....driver.partition_window import read_file_system, read_partition_table
from ....partitions.values import Partition, PartitionTable
from ....printable import printable
from ...image_names import options_of_names
from ...json_text import to_text
from ...passphrase import KeySource
from ...size_text import size_text
from ...stopping import run_until_stopped
from ..arguments import Given
from ..exit_codes import ImgExit

_HEADINGS = ("No", "Start", "Bytes", "Size", "Boot", "File system", "Type", "UUID", "Label")
_TO_THE_RIGHT = frozenset((0, 1, 2, 3))


def run(given: Given) -> int:
    """Print the partitions of the disk inside."""
    options = options_of_names(given)._replace(read_only=True, force_share=given.force_share, snapshot=given.snapshot)
    key = KeySource(given.key_file, os.environ)
    key.prepare(given.image, options)

    async def work() -> int:
        with key.explained():
            image = await open_image(given.image, options._replace(passphrase=key))
        try:
            await _print_partitions(image, as_json=given.output == "json")
        finally:
            await image.aclose()
        return ImgExit.OK

    return run_until_stopped(work)


async def _print_partitions(image: Image, *, as_json: bool) -> None:
    """Print what is found. Raises what reading the image raises."""
    table = await read_partition_table(image)
    if table.kind:
        whole = ""
        inside = [
            "" if partition.is_container else await read_file_system(image, partition.start, partition.n_bytes)
            for partition in table.partitions
        ]
    else:
        whole, inside = await read_file_system(image, 0, image.size), []
    if as_json:
        print(to_text(_as_json(image, table, whole, inside)))
    else:
        for line in _lines(image, table, whole, inside):
            print(printable(line))


def _as_json(image: Image, table: PartitionTable, whole: str, inside: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "filename": image.path,
        "virtual-size": image.size,
        "table": table.kind or None,
    }
    if table.kind:
        found |= {"table-id": table.disk_id, "sector-size": table.sector_size}
    else:
        found["filesystem"] = whole or None
    found["problems"] = list(table.problems)
    found["partitions"] = [
        {
            "number": partition.number,
            "start": partition.start,
            "size": partition.n_bytes,
            "type": partition.type_id,
            "type-name": partition.type_name or None,
            "label": partition.label or None,
            "uuid": partition.uuid or None,
            "bootable": partition.is_bootable,
            "container": partition.is_container,
            "filesystem": file_system or None,
            "problem": partition.problem or None,
        }
        for partition, file_system in zip(table.partitions, inside, strict=True)
    ]
    return found


def _lines(image: Image, table: PartitionTable, whole: str, inside: Sequence[str]) -> Iterator[str]:
    yield f"image: {image.path}"
    yield f"virtual size: {size_text(image.size)} ({image.size} bytes)"
    if table.kind:
        yield f"partition table: {table.kind}, sectors of {table.sector_size} bytes, {table.disk_id}"
    else:
        yield f"partition table: none{f'; the disk is one file system, {whole}' if whole else ''}"
    for problem in table.problems:
        yield f"problem: {problem}"
    rows = [_HEADINGS, *map(_row, table.partitions, inside)] if table.partitions else []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        yield "  ".join(
            cell.rjust(width) if column in _TO_THE_RIGHT else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        if number and (problem := table.partitions[number - 1].problem):
            yield f"    problem of {table.partitions[number - 1].number}: it {problem}"


def _row(partition: Partition, file_system: str) -> tuple[str, ...]:
    return (
        str(partition.number),
        str(partition.start),
        str(partition.n_bytes),
        size_text(partition.n_bytes),
        "yes" if partition.is_bootable else "",
        file_system,
        partition.type_name or partition.type_id,
        partition.uuid,
        partition.label,
    )
