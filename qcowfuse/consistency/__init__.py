"""Whether an image is consistent, and mending it. Below the disk, since opening a dirty image repairs it first.

1. A check changes nothing, and says what it found in a ``Result``.
2. Its memory is bounded by named limits, whatever the image says of its own size.
3. A repair may be cut off at any point: what it leaves is no worse than what it found (crash points in
``repair``).

Modules: ``walk`` (every reference that the tables hold), ``snapshots`` (those of internal snapshots), ``compare``
(references against refcounts), ``counted_refcounts`` (the refcounts of the file), ``plain_tables`` (tables counted at
once), ``result``, ``repair``, and ``lost_end`` (files that were cut short).
"""
