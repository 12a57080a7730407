"""Compressed clusters: the bytes of one as they were before.

1. Output is bounded by one cluster, whatever the stream claims to hold.
2. Bytes behind the stream are ignored: the format knows a stream's end only to a sector of 512 bytes.
3. Deflate goes through ISA-L where there is a build of it: up to twice as fast as zlib. What it refuses, zlib has
   the last word on, as in QEMU: of damaged streams zlib decodes some that ISA-L does not. ISA-L always decodes a
   whole cluster; the start of one comes from zlib-ng.
4. Zstd may come in several frames, as QEMU reads it: they follow each other until the cluster is full, which must be
   where one of them ends. What comes behind that is ignored.

Microseconds for a cluster of 64 KiB that was packed to 86 %: zlib 217, zlib-ng 168, ISA-L 153, libdeflate 143; for
its first 4 KiB: zlib 13, ISA-L 153.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from ..buffer import Buffer
from ..errors import FormatError
from .header_fields import COMPRESSION_DEFLATE, COMPRESSION_ZSTD

try:
    from isal import isal_zlib as deflate
except ImportError:  # other processors than x86-64 and ARM64
    deflate = zlib  # type: ignore[misc]

try:
    from zlib_ng import zlib_ng as stream_deflate
except ImportError:
    stream_deflate = zlib  # type: ignore[misc]

if TYPE_CHECKING:
    import zstandard

_STRUCTURE = "compressed cluster"
_MAX_WINDOW_BITS = 15
_FRAME_MAGIC_ENDS = (0x28, 0xFD)
_ZSTD_STEP = 16
_DeflateError: type[Exception] = deflate.error  # type: ignore[assignment]  # the stubs say that it is an instance
_StreamError: type[Exception] = stream_deflate.error  # type: ignore[assignment]

Outcome = bytes | memoryview | FormatError
"""A cluster, or what is wrong with it."""

# A decompressor serves one thread at a time, and a new one costs half as much as a cluster. Taking from a list and
# giving back are atomic; there are never more than threads that decode.
_idle_zstd: list[zstandard.ZstdDecompressor] = []


def decompress_cluster(data: Buffer, compression_type: int, cluster_size: int) -> bytes:
    """Exactly ``cluster_size`` bytes out of ``data``. Safe to call from several threads at once.

    Version 1 images use compression type 0 as well. Raises FormatError for a broken stream and for one that
    ends before the cluster does.
    """
    if compression_type == COMPRESSION_DEFLATE:
        cluster = _inflate(data, cluster_size)
    elif compression_type == COMPRESSION_ZSTD:
        cluster = _decompress_zstd(data, cluster_size)
    else:
        raise FormatError(_STRUCTURE, None, f"compression type {compression_type}, expected 0 or 1")
    if len(cluster) != cluster_size:
        raise FormatError(_STRUCTURE, None, f"{len(cluster)} bytes when unpacked, expected {cluster_size}")
    return cluster


def decompress_clusters(packed: Sequence[Buffer], compression_type: int, cluster_size: int) -> list[Outcome]:
    """For each of several clusters what :func:`decompress_cluster` gives or raises.

    Those of zstd are unpacked without coming back for the interpreter's lock in between, where nothing is unusual
    about any of them; they are parts of one buffer then.
    """
    if compression_type == COMPRESSION_ZSTD and len(packed) > 1:
        clusters = _decompress_zstd_batch(packed, cluster_size)
        if clusters is not None:
            return clusters
    outcomes: list[Outcome] = []
    for data in packed:
        try:
            outcomes.append(decompress_cluster(data, compression_type, cluster_size))
        except FormatError as error:
            outcomes.append(error)
    return outcomes


def decompress_start(data: Buffer, n_bytes: int) -> bytes | None:
    """The first ``n_bytes`` of a cluster that is packed with deflate; None where :func:`decompress_cluster` has
    to tell what is wrong with it."""
    try:
        start = stream_deflate.decompressobj(-_MAX_WINDOW_BITS).decompress(data, n_bytes)
    except _StreamError:
        return None
    return start if len(start) == n_bytes else None


def _inflate(data: Buffer, cluster_size: int) -> bytes:
    # Writers use a window of 2^12; a reader with the largest window takes every smaller one too.
    with suppress(_DeflateError):
        cluster = deflate.decompressobj(-_MAX_WINDOW_BITS).decompress(data, cluster_size)
        if len(cluster) == cluster_size:
            return cluster
    try:
        return zlib.decompressobj(-_MAX_WINDOW_BITS).decompress(data, cluster_size)
    except zlib.error as error:
        raise FormatError(_STRUCTURE, None, f"broken deflate stream ({error})") from None


def require_decoder(compression_type: int) -> None:
    """Load what the clusters of an image need, when it is opened. Deflate is always there: no header tells whether
    an image has clusters packed with it."""
    if compression_type == COMPRESSION_ZSTD:
        import zstandard  # noqa: F401


def _decompress_zstd_batch(packed: Sequence[Buffer], cluster_size: int) -> list[Outcome] | None:
    import zstandard

    try:
        decompressor = _idle_zstd.pop()
    except IndexError:
        decompressor = zstandard.ZstdDecompressor()
    sizes = cluster_size.to_bytes(8, sys.byteorder) * len(packed)
    try:
        batch = decompressor.multi_decompress_to_buffer(list(packed), decompressed_sizes=sizes)
    except (zstandard.ZstdError, ValueError, AttributeError):  # also where the backend is not the one in C
        return None
    finally:
        _idle_zstd.append(decompressor)
    clusters = [memoryview(batch[number]) for number in range(len(batch))]  # type: ignore[arg-type]
    is_whole = len(clusters) == len(packed) and all(len(cluster) == cluster_size for cluster in clusters)
    return list(clusters) if is_whole else None


def _decompress_zstd(data: Buffer, cluster_size: int) -> bytes:
    import zstandard

    try:
        decompressor = _idle_zstd.pop()
    except IndexError:
        decompressor = zstandard.ZstdDecompressor()
    try:
        n_claimed = zstandard.get_frame_parameters(data).content_size
        if (data[0], data[3]) == _FRAME_MAGIC_ENDS:  # a skippable frame has another length there
            if n_claimed == cluster_size:
                return decompressor.decompress(data)
            if n_claimed != zstandard.CONTENTSIZE_UNKNOWN and n_claimed > cluster_size:
                raise FormatError(_STRUCTURE, None, f"{n_claimed} bytes when unpacked, expected {cluster_size}")
        return _decompress_zstd_frames(decompressor, data, cluster_size)
    except zstandard.ZstdError:
        # What libzstd says of the reason depends on what it decoded before, and where to.
        raise FormatError(_STRUCTURE, None, "broken zstd stream") from None
    finally:
        _idle_zstd.append(decompressor)


def _decompress_zstd_frames(decompressor: zstandard.ZstdDecompressor, data: Buffer, cluster_size: int) -> bytes:
    """Several frames, or one that does not say its length. A few bytes go in at a time: they can't make many."""
    parts: list[bytes] = []
    n_bytes = 0
    frame = decompressor.decompressobj()
    for start in range(0, len(data), _ZSTD_STEP):
        rest = bytes(data[start : start + _ZSTD_STEP])
        while rest:
            part = frame.decompress(rest)
            parts.append(part)
            n_bytes += len(part)
            if n_bytes > cluster_size:
                raise FormatError(_STRUCTURE, None, f"more than {cluster_size} bytes when unpacked")
            rest = b""
            if frame.eof:
                if n_bytes == cluster_size:
                    return b"".join(parts)
                rest = frame.unused_data
                frame = decompressor.decompressobj()
    if n_bytes == cluster_size:
        raise FormatError(_STRUCTURE, None, "broken zstd stream (the last frame has no end)")
    raise FormatError(_STRUCTURE, None, f"{n_bytes} bytes when unpacked, expected {cluster_size}")
