"""Guest data into an image: allocation, links, and the one order in which metadata reaches the file.

Only ``write_back`` writes metadata (rules R1 to R5); the others change memory, in plain functions between two awaits.

Modules: ``changes`` (all that changes a disk), ``life_cycle`` (beginning, freezing, closing), ``requests`` (writes as
they are started, by kind of disk), ``writer`` with ``writer_at_once`` (executing a write), ``new_tables`` (L2 tables
for it), ``zeroing`` with ``zeroing_at_once``, ``reserving`` (space set aside), ``growing``, ``allocation`` (the face
of both allocators), ``refcount_allocation`` with ``refcount_blocks`` and ``refcount_growth``, ``append_allocation``
(that of version 1), ``host_clusters`` (what a writable image has to manage them), ``guarded_clusters`` and
``guarded_clusters_v1`` (nothing on top of tables; ``sorted_clusters``), ``unguarded`` (clusters in use whose count is
0), ``metadata_space`` (room on the file system for what a flush will write), ``write_back`` (flush) with ``round``
(what it has taken), ``feature_bits``, ``dirty_bitmaps`` (persistent ones kept right) with ``bitmap_storing``
(made valid again at the end), ``zero_detection``.
"""
