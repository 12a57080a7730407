"""What a virtual disk is made of: where its bytes lie, what lies over them, and who is busy with which of them.

1. Nothing here knows how to read or write guest data as a whole: ``reading`` and ``writing`` do, and lie above.
2. Every look-up is a plain function; only what may have to read a table is async.

Modules: ``mapping`` (guest range to extents), ``table_cache`` (LRU of L2 slices), ``host_run`` (host clusters in a
row), ``data_file`` (an external data file), ``encryption`` (guest data behind a cipher), ``range_claims``
(allocations and operations in flight), ``holes`` (where there is data), ``usage`` (what ``du`` should say).
"""
