"""The in-memory consistency check says what ``qemu-img check`` says."""

from __future__ import annotations

import random
import struct

import pytest

from tests.support.checker import check_image_bytes
from tests.support.images import TOP, ImageSpec, build_image, qemu_check

KIB = 1 << 10
SPECS = {
    "v3": ImageSpec(size=128 * KIB, fill=0.7),
    "v2-snapshot": ImageSpec(version=2, size=128 * KIB, fill=0.7, snapshot=True),
    "refcount-4": ImageSpec(size=128 * KIB, fill=0.7, refcount_bits=4, cluster_size=1024, zeroes=True),
    "refcount-64": ImageSpec(size=128 * KIB, fill=0.7, refcount_bits=64, snapshot=True),
    "zlib": ImageSpec(size=128 * KIB, fill=0.7, cluster_size=4096, compression="zlib", snapshot=True),
    "extended": ImageSpec(size=256 * KIB, fill=0.7, cluster_size=16384, extended_l2=True, zeroes=True),
}


def damages(data: bytes, spec: ImageSpec, chooser: random.Random) -> list[bytes]:
    """Copies of an image with one refcount, one COPIED flag, one reference or one table changed."""
    l1_size, l1_offset = struct.unpack_from(">IQ", data, 36)
    (table_offset,) = struct.unpack_from(">Q", data, 48)
    (block_offset,) = struct.unpack_from(">Q", data, table_offset)
    l1_entries = [entry for entry in struct.unpack_from(f">{l1_size}Q", data, l1_offset) if entry]
    step = 16 if spec.extended_l2 else 8
    places = []
    for l1_entry in l1_entries:
        l2_offset = l1_entry & 0x00FF_FFFF_FFFF_FE00
        for place in range(l2_offset, l2_offset + spec.cluster_size, step):
            (entry,) = struct.unpack_from(">Q", data, place)
            if entry & 0x00FF_FFFF_FFFF_FE00 and not entry >> 62 & 1:
                places.append(place)
    found = []
    for _ in range(6):
        damaged = bytearray(data)
        place = block_offset + chooser.randrange(min(64, spec.cluster_size))
        damaged[place] ^= 1
        found.append(bytes(damaged))
    for place in chooser.sample(places, min(3, len(places))):
        damaged = bytearray(data)
        damaged[place] ^= 0x80  # COPIED
        found.append(bytes(damaged))
        damaged = bytearray(data)
        damaged[place : place + 8] = bytes(8)  # unlinked
        if not spec.extended_l2:
            found.append(bytes(damaged))
        damaged = bytearray(data)
        other = chooser.choice(places)
        damaged[place : place + 8] = damaged[other : other + 8]  # linked twice
        found.append(bytes(damaged))
    return found


@pytest.mark.parametrize("name", SPECS)
def test_the_checker_agrees_with_qemu(name: str) -> None:
    """Clean, leaking or corrupt: the same verdict on sound and on damaged images."""
    spec = SPECS[name]
    data = build_image(spec).top
    verdicts = set()
    for candidate in [data, *damages(data, spec, random.Random(name))]:
        report = check_image_bytes(candidate)
        code, output = qemu_check({TOP: candidate})
        assert report.exit_code == code, f"{report.errors[:3]}; QEMU: {output}"
        verdicts.add(code)
    assert 0 in verdicts
    assert verdicts & {2, 3}
