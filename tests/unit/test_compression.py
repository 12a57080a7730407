"""Compressed clusters: the bits of their entries, and streams good and bad."""

from __future__ import annotations

import contextlib
import random
import re
import tracemalloc
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from qcowfuse.errors import FormatError
from qcowfuse.format.compressed_entries import (
    CompressedCluster,
    parse_compressed_entry,
    parse_compressed_entry_v1,
)
from qcowfuse.format.compression import decompress_cluster, decompress_clusters

COMPRESSED = 1 << 62
CLUSTER = 65536
DEFLATE, ZSTD = 0, 1


def deflate(data: bytes, window_bits: int = 12) -> bytes:
    packer = zlib.compressobj(wbits=-window_bits)
    return packer.compress(data) + packer.flush()


@cache
@cache
def text(n_bytes: int = CLUSTER) -> bytes:
    rng = random.Random(1)
    words = b"".join(rng.choice((b"qcow", b"two", b" cluster ", bytes(50))) for _ in range(4000))
    return (words * (n_bytes // len(words) + 1))[:n_bytes]


PACKERS: dict[str, tuple[int, Callable[[bytes], bytes]]] = {
    "deflate": (DEFLATE, deflate),
    "deflate-window-15": (DEFLATE, lambda data: deflate(data, 15)),
    "zstd": (ZSTD, zstandard.ZstdCompressor().compress),
    "zstd-checksum": (ZSTD, zstandard.ZstdCompressor(write_checksum=True).compress),
    "zstd-no-size": (ZSTD, zstandard.ZstdCompressor(write_content_size=False).compress),
    "zstd-19": (ZSTD, zstandard.ZstdCompressor(level=19).compress),
}


@cache
def packed_text(packer: str, n_bytes: int) -> bytes:
    """Packed by the packer of that name."""
    return PACKERS[packer][1](text(n_bytes))


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("cluster_size", [512, 4096, CLUSTER, 1 << 20])
@pytest.mark.parametrize("kind", ["text", "zero", "random"])
def test_every_way_of_packing(packer: str, cluster_size: int, kind: str) -> None:
    """A cluster comes back whole, with rubbish behind the stream, from bytes and from a memoryview."""
    compression_type, pack = PACKERS[packer]
    data = {
        "text": text(cluster_size),
        "zero": bytes(cluster_size),
        "random": random.Random(2).randbytes(cluster_size),
    }
    packed = pack(data[kind])
    for rubbish in (b"", bytes(300), b"\xff" * 511):
        assert decompress_cluster(packed + rubbish, compression_type, cluster_size) == data[kind]
        assert decompress_cluster(memoryview(packed + rubbish), compression_type, cluster_size) == data[kind]
        assert decompress_cluster(bytearray(packed + rubbish), compression_type, cluster_size) == data[kind]


def test_zstd_in_several_frames() -> None:
    """A zstd cluster may come in several frames, an empty one among them."""
    data = text()
    pack = zstandard.ZstdCompressor().compress
    packed = pack(data[:1000]) + pack(b"") + pack(data[1000:5000]) + pack(data[5000:])
    assert decompress_cluster(packed + bytes(200), ZSTD, CLUSTER) == data


@pytest.mark.parametrize("packer", PACKERS)
def test_too_short_a_cluster(packer: str) -> None:
    """A stream that ends before the cluster is full is an error with both lengths, or broken with rubbish behind."""
    compression_type, pack = PACKERS[packer]
    packed = pack(text(CLUSTER - 1))
    with pytest.raises(FormatError, match="65535 bytes when unpacked, expected 65536"):
        decompress_cluster(packed, compression_type, CLUSTER)
    with pytest.raises(FormatError):
        decompress_cluster(packed + b"\xff" * 511, compression_type, CLUSTER)


@pytest.mark.parametrize("packer", PACKERS)
def test_cut_streams(packer: str) -> None:
    """A stream that is cut is an error, wherever the cut is."""
    compression_type, pack = PACKERS[packer]
    packed = pack(random.Random(4).randbytes(CLUSTER))
    for length in (0, 1, 2, 5, 9, 100, len(packed) // 2, len(packed) - 100):
        with pytest.raises(FormatError):
            decompress_cluster(packed[:length], compression_type, CLUSTER)


@pytest.mark.parametrize("compression_type", [DEFLATE, ZSTD])
@given(data=st.binary(max_size=600))
def test_any_bytes(compression_type: int, data: bytes) -> None:
    """Whatever the bytes: one cluster or FormatError."""
    with contextlib.suppress(FormatError):
        assert len(decompress_cluster(data, compression_type, 4096)) == 4096


@given(data=st.data())
def test_damaged_streams(data: st.DataObject) -> None:
    """A good stream with some bytes changed gives one cluster or FormatError."""
    compression_type, pack = PACKERS[data.draw(st.sampled_from(sorted(PACKERS)))]
    packed = bytearray(pack(text(4096)))
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(FormatError):
        assert len(decompress_cluster(packed, compression_type, 4096)) == 4096


@pytest.mark.parametrize("packer", PACKERS)
def test_bombs_are_bounded(packer: str) -> None:
    """A stream of 32 MiB in a few KiB costs no more memory than a few clusters."""
    compression_type, pack = PACKERS[packer]
    packed = pack(bytes(32 << 20))[: 2 * CLUSTER]
    tracemalloc.start()
    try:
        try:
            assert decompress_cluster(packed, compression_type, CLUSTER) == bytes(CLUSTER)
        except FormatError:
            assert compression_type == ZSTD
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compression_type", [DEFLATE, ZSTD])
def test_several_at_once(compression_type: int) -> None:
    """Clusters packed in every way come back in order, with rubbish behind each, from views of one buffer."""
    packers = [pack for kind, pack in PACKERS.values() if kind == compression_type] * 3
    clusters = [random.Random(number).randbytes(100) * 40 + bytes(96) for number in range(len(packers))]
    packed = [pack(data) + b"\xff" * 77 for pack, data in zip(packers, clusters, strict=True)]
    if compression_type == ZSTD:
        half = zstandard.ZstdCompressor().compress
        packed.append(half(clusters[0][:1000]) + half(clusters[0][1000:]) + bytes(9))
        clusters.append(clusters[0])
    whole = memoryview(b"".join(packed))
    views, start = [], 0
    for data in packed:
        views.append(whole[start : start + len(data)])
        start += len(data)
    for n_clusters in (0, 1, 2, len(packers), len(packed)):
        outcomes = decompress_clusters(views[:n_clusters], compression_type, 4096)
        assert outcomes == clusters[:n_clusters]


@pytest.mark.parametrize("compression_type", [DEFLATE, ZSTD])
@given(damage=st.data())
def test_damage_among_several(compression_type: int, damage: st.DataObject) -> None:
    """Of several clusters each has the outcome that it has alone, whatever the others are: broken, cut, empty, too
    short, or of a size that none can have."""
    packers = [name for name, (kind, _) in PACKERS.items() if kind == compression_type]
    packed = []
    for _ in range(damage.draw(st.integers(2, 5))):
        n_bytes = damage.draw(st.sampled_from((4096, 4096, 4095, 4097, 0, 1 << 20)))
        stream = bytearray(packed_text(damage.draw(st.sampled_from(packers)), n_bytes))
        for _ in range(damage.draw(st.integers(0, 2)) if stream else 0):
            stream[damage.draw(st.integers(0, len(stream) - 1))] = damage.draw(st.integers(0, 255))
        packed.append(bytes(stream[: damage.draw(st.sampled_from((len(stream), len(stream), len(stream) // 2, 0)))]))
    for data, outcome in zip(packed, decompress_clusters(packed, compression_type, 4096), strict=True):
        if isinstance(outcome, FormatError):
            with pytest.raises(FormatError, match=f"^{re.escape(str(outcome))}$"):
                decompress_cluster(data, compression_type, 4096)
        else:
            assert outcome == decompress_cluster(data, compression_type, 4096)


def test_a_bomb_among_several_is_bounded() -> None:
    """Streams of 32 MiB among good ones cost no more memory than the clusters do."""
    for name, (compression_type, pack) in PACKERS.items():
        packed = [pack(text()), pack(bytes(32 << 20))[: 2 * CLUSTER], pack(text())]
        tracemalloc.start()
        try:
            first, bomb, last = decompress_clusters(packed, compression_type, CLUSTER)
            assert first == last == text(), name
            assert bomb == bytes(CLUSTER) or isinstance(bomb, FormatError), name
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        finally:
            tracemalloc.stop()


def test_unknown_compression_type() -> None:
    """A compression type that does not exist is an error that names it."""
    with pytest.raises(FormatError, match="compression type 2"):
        decompress_cluster(b"", 2, 512)


def test_threads_do_not_share() -> None:
    """Clusters unpacked in several threads at once are each right."""
    rng = random.Random(7)
    clusters = [rng.randbytes(2000) * 32 for _ in range(64)]
    for compression_type, pack in (PACKERS["deflate"], PACKERS["zstd"]):
        with ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(decompress_cluster, pack(data), compression_type, 64000) for data in clusters]
            assert [job.result() for job in jobs] == clusters


@pytest.mark.parametrize(
    ("cluster_bits", "entry", "expected"),
    [
        (16, COMPRESSED | 0x50000, CompressedCluster(0x50000, 512)),
        (16, COMPRESSED | 3 << 54 | 0x50001, CompressedCluster(0x50001, 4 * 512 - 1)),
        (16, COMPRESSED | 255 << 54 | (1 << 54) - 1, CompressedCluster((1 << 54) - 1, 256 * 512 - 511)),
        (9, COMPRESSED | 1 << 61 | 512 + 511, CompressedCluster(1023, 513)),
        (21, COMPRESSED | 8191 << 49 | 0x200000, CompressedCluster(0x200000, 4 << 20)),
    ],
)
def test_entries_of_version_2_and_3(cluster_bits: int, entry: int, expected: CompressedCluster) -> None:
    """Offset and sector count are split where the cluster size puts the border."""
    assert parse_compressed_entry(entry, cluster_bits) == expected


@given(st.integers(0, (1 << 64) - 1), st.integers(9, 21))
def test_any_entry_is_bounded(entry: int, cluster_bits: int) -> None:
    """No entry asks for less than a byte or more than two clusters, or reaches past 2^62."""
    where = parse_compressed_entry(entry, cluster_bits)
    assert 1 <= where.n_bytes <= 2 << cluster_bits
    assert 0 <= where.host_offset < 1 << 62


@given(st.integers(1, 4095), st.integers(0, (1 << 51) - 1))
def test_entries_of_version_1(n_bytes: int, host_offset: int) -> None:
    """Version 1 counts bytes, above the offset."""
    entry = 1 << 63 | n_bytes << 51 | host_offset
    assert parse_compressed_entry_v1(entry, 12) == CompressedCluster(host_offset, n_bytes)


def test_empty_entry_of_version_1() -> None:
    """A version 1 entry of no bytes is an error that shows the entry."""
    with pytest.raises(FormatError, match="0x8000000000001000"):
        parse_compressed_entry_v1(1 << 63 | 4096, 12)
