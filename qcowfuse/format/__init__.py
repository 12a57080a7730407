"""QCOW on disk, sans I/O: bytes to values and back, with stdlib, zstandard, cryptography, libgcrypt and ``errors``.

Modules: ``geometry`` (addresses, shifts), ``header`` with ``header_fields``, ``header_parsing``, ``header_bytes`` and
``extensions`` (v1, v2, v3), ``entries`` (L1 and L2 entries), ``subclusters`` (extended L2 entries), ``refcounts``
(refcount blocks of every width), ``extents`` (runs of guest bytes), ``presence`` and ``short_runs`` (where there is
data), ``table_runs`` and ``all_runs`` (runs of entries, for tools), ``cow_plan`` (what a write has to do),
``zero_plan`` (what zeroing does), ``reserve_plan`` (what setting space aside does), ``compressed_entries`` and
``compression`` (one compressed cluster), ``snapshots`` and ``bitmap_directory`` (the tables behind those two
features), ``bitmaps`` (the bits of a dirty bitmap), ``luks`` (the LUKS header), ``luks_keys`` (keys in and out of
it), ``crypto`` (ciphers), ``libgcrypt`` (the library, where it is installed), ``size_fields`` (of the header, when a
disk grows).

1. Nothing here opens, reads, waits or logs.
2. Whatever the bytes, only FormatError and its subclasses are raised.
3. No size found in an image is used to allocate before it has been checked against a named limit.
"""
