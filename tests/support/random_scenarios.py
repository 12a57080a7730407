"""Scenarios made at random: images of some kind, operations on them, perhaps a fault, and what the files lie on.

1. The same random generator makes the same scenarios.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from .images import Backing, ImageSpec
from .old_bytes import KINDS
from .recording import SECTOR
from .scenarios import KIB, Fault, Scenario, Step


def random_spec(chooser: random.Random) -> ImageSpec:
    """An image of some kind, small."""
    kinds = ("v1", "v2", "v3", "v3", "tables", "extended", "compressed", "full-table", "data-file", "encrypted")
    kind = chooser.choice(kinds)
    seed = chooser.randrange(4)
    fill = chooser.choice((0.0, 0.3, 0.8, 1.0))
    backing: Backing | None = chooser.choice((None, None, "raw", "qcow2"))
    size = chooser.choice((64, 100, 256)) * KIB + chooser.choice((0, 0, 512, 1536))
    backing_size = size // 4096 * 4096 * chooser.choice((1, 2)) // 2 if backing else 0
    base = ImageSpec(size=size, fill=fill, backing=backing, backing_size=backing_size, seed=seed)
    if kind == "v1":
        cluster_size = chooser.choice((512, 1024, 4096))
        raw_only: Backing | None = "raw" if backing else None
        return replace(
            base, version=1, cluster_size=cluster_size, fill=0.0, backing=raw_only, l2_bits=chooser.choice((6, 7, 9))
        )
    snapshot = chooser.random() < 0.4
    if kind == "tables":  # of eight sectors, three of them
        return ImageSpec(
            cluster_size=4096,
            size=5 << 20,
            fill=0.02 if fill > 0.5 else 0.0,
            seed=seed,
            refcount_bits=chooser.choice((16, 64)),
            snapshot=snapshot and fill > 0.5,
        )
    if kind == "full-table":
        return ImageSpec(refcount_bits=64, size=2200 * KIB, fill=0.86, seed=seed)
    if kind == "data-file":
        data_file: Literal["plain", "raw"] = chooser.choice(("plain", "raw"))
        only = None if data_file == "raw" else backing
        return replace(
            base,
            backing=only,
            backing_size=backing_size if only else 0,
            cluster_size=chooser.choice((512, 4096)),
            data_file=data_file,
            zeroes=fill > 0.5,
        )
    if kind == "encrypted":
        return replace(base, cluster_size=4096, encryption="luks", size=size // 4096 * 4096)
    if kind == "v2":
        return replace(base, version=2, cluster_size=chooser.choice((512, 2048, 4096)), snapshot=snapshot)
    if kind == "extended":
        cluster_size = chooser.choice((16384, 32768))
        return replace(
            base, size=512 * KIB, cluster_size=cluster_size, extended_l2=True, snapshot=snapshot, zeroes=fill > 0.5
        )
    if kind == "compressed":
        return replace(
            base,
            cluster_size=4096,
            size=size // 4096 * 4096,
            fill=max(fill, 0.3),
            compression=chooser.choice(("zlib", "zstd")),
            snapshot=snapshot,
        )
    refcount_bits = chooser.choice((1, 4, 8, 16, 64))
    return replace(
        base,
        cluster_size=chooser.choice((512, 512, 1024, 4096)),
        refcount_bits=refcount_bits,
        snapshot=snapshot and refcount_bits > 1,
        zeroes=chooser.random() < 0.4,
    )


def random_scenario(
    chooser: random.Random,
    spec: ImageSpec,
    *,
    n_steps: int = 30,
    may_fail: bool = True,
    may_grow: bool = False,
    aligned: bool = False,
) -> Scenario:
    """Operations at random on an image of ``spec``, on any kind of storage; about half of the scenarios have a fault
    where they may. Those that have none let the disk grow now and then where they may.

    ``aligned``: whole sectors, so that a fault may be added to the scenario.
    """
    with_fault = may_fail and chooser.random() < 0.5
    suspend = chooser.random() < 0.5
    aligned = aligned or with_fault or suspend
    size = spec.size
    start = chooser.choice((0, 0, size // 2 // SECTOR * SECTOR))
    end = size if chooser.random() < 0.6 else min(size, start + 24 * KIB)
    steps: list[Step] = []
    for _ in range(chooser.randint(3, n_steps)):
        roll = chooser.random()
        if may_grow and not with_fault and spec.size <= 256 * KIB and chooser.random() < 0.03:
            more = chooser.choice((1, 8, 100, 2000)) * SECTOR
            steps.append(("grow", more))
            size = end = size // SECTOR * SECTOR + more
            continue
        if suspend and roll < 0.15:
            steps.append(("together", tuple(_random_group(chooser, start, end))))
        elif suspend and roll < 0.22:
            step = _random_step(chooser, start, end, aligned=True)
            steps.append(("cancel", chooser.randrange(8), step))
        elif roll < 0.4:
            steps.append(("flush",))
        else:
            steps.append(_random_step(chooser, start, end, aligned=aligned))
    fault = None
    if with_fault:
        code = chooser.choice((errno.EIO, errno.ENOSPC))
        fault = Fault(chooser.randrange(8 * len(steps)), code, for_ever=chooser.random() < 0.3)
    tiny_caches = chooser.random() < 0.4
    scenario_seed = chooser.randrange(1 << 30)
    # A raw data file that the disk grows into shows what lies behind its end.
    shows_old = spec.data_file == "raw" and any(step[0] == "grow" for step in steps)
    return Scenario(
        spec,
        tuple(steps),
        suspend=suspend,
        tiny_caches=tiny_caches,
        fault=fault,
        seed=scenario_seed,
        storage="file" if spec.version == 1 or shows_old else KINDS[scenario_seed % len(KINDS)],
    )


def _random_step(chooser: random.Random, start: int, end: int, *, aligned: bool) -> Step:
    unit = SECTOR if aligned else 1
    n_bytes = min(chooser.choice((1, 512, 2048, 4096, 9000, 20000)) + unit - 1, end - start) // unit * unit or unit
    offset = chooser.randrange(start, max(start + 1, end - n_bytes + 1)) // unit * unit
    n_bytes = min(n_bytes, end - offset)
    kind = chooser.choice(("write", "write", "write", "write", "discard", "zero", "reserve", "read"))
    return ("write", offset, n_bytes, chooser.randrange(1 << 20)) if kind == "write" else (kind, offset, n_bytes)


def _random_group(chooser: random.Random, start: int, end: int) -> Iterator[Step]:
    """Two to five operations on sectors of their own, near each other, and perhaps fsyncs among them."""
    n_parts = chooser.randint(2, 5)
    sectors = (end - start) // SECTOR
    if sectors < n_parts:
        return
    bounds = sorted(chooser.sample(range(sectors + 1), n_parts + 1)) if chooser.random() < 0.5 else None
    first = chooser.randrange(sectors - n_parts + 1)
    for number in range(n_parts):
        if chooser.random() < 0.25:
            yield ("flush",)
            continue
        offset = start + SECTOR * (first + number if bounds is None else bounds[number])
        n_bytes = SECTOR if bounds is None else min(SECTOR * (bounds[number + 1] - bounds[number]), 16 * KIB)
        kind = chooser.choice(("write", "write", "write", "discard", "zero", "reserve", "read"))
        yield ("write", offset, n_bytes, chooser.randrange(1 << 20)) if kind == "write" else (kind, offset, n_bytes)
