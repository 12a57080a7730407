"""The virtual disk over a QCOW image: what is where, what a write has to do, and in which order.

Modules: ``image`` (the protocol that the layers above see), ``pending`` (requests that go on), ``options``, ``files``
(which files it may open), ``chain`` (open_image and the backing chain), ``opened_layers`` and ``assembly`` (from its
layers to the disk), ``overlay`` (what may lie over it), ``qcow_image`` (versions 1, 2 and 3), ``counters``,
``partition_window`` (a partition as a disk). The packages between them: ``layers`` (where bytes lie and what lies
over them), ``reading``, ``writing``. ``chain`` has a dirty image repaired before it is written.

Theory of operation
-------------------

Everything runs in one trio thread. Metadata in memory is the truth for the guest; it changes only in plain
functions, between two awaits, so nothing needs a lock for it. What the image file has is behind memory, never ahead
of it, and always consistent but for leaks, because only one module writes metadata, in one order:
``writing.write_back``.

A write that is not in place claims its guest clusters, takes host clusters (counts raised in memory), writes head,
data and tail with one call, and links them in memory. Others that want the same clusters wait for the claim and look
again. fsync then writes counts, flushes, writes links, flushes.

New L2 tables are not written through one by one: no L1 entry on disk points at them until the flush after their
contents, so their slices may be written early and their L1 entries go out with the other links. A table costs
no flush of its own, and rule R4 holds all the same.

What a crash at any point may cost: leaked clusters. Never: corruption, or a byte that an fsync had promised.

Crash points, each by its name, by the steps of a round in ``writing.write_back``:

    round-not-begun
        before step 2: nothing of the round is on disk; clusters written by the guest are unreferenced data
    counts-partly-written
        in step 2: raised counts without references: leaks
    blocks-without-pointers
        between the flush and the pointers of step 2: new refcount blocks that nothing points at: free space
    tables-without-entries
        in step 3: contents of tables that no L1 entry points at: leaks at worst
    links-partly-written
        in step 5: some links are there, some are not; each that is has its count and contents: leaks
    counts-not-lowered
        after step 6, before the next round: unlinked clusters still have their old, too high counts: leaks

The same round, where it has to do with more than counts and links:

    refcount-table-moved
        in step 2: the header names the old table or the new one, both are complete for all that is linked; the
        clusters of the other one leak
    data-file-flushed-first
        in step 4, between the flush of an external data file and that of the image: data that nothing links to yet
    zeroes-partly-linked
        after a discard or write zeroes, before step 6: each cluster reads as zeroes or as before; leaks
    holes-partly-punched
        in step 7: clusters that nothing refers to, with anything in them
    links-for-eviction
        in a round for eviction, which ends with step 5: links that no fsync asked for; leaks
    round-failed
        after a round that failed: counts and links of it are there or not, the next round writes all of them again;
        after a failed flush none ever does, and what an earlier fsync promised is untouched by it

Beside the rounds:

    autoclear-without-data
        between the clearing of autoclear bits and the first write: bits that are cleared too early are harmless
    bitmaps-in-use
        from the first write until the last step of closing: bitmaps are marked in use, and nothing trusts them
    size-changing
        while the disk grows: the header has the old size and L1 table or the new ones, and both are whole; zeroes
        that hide what lay behind the old end are durable before. What was taken for the new table leaks
    corrupt-bit-set
        while the corrupt bit is set, for which the header is written once: it is there or not, nothing else changes
    closing
        closing is one or two rounds, with the crash points of a round; with the last one complete nothing is leaked
    version-1-unlinked
        version 1 has no counts: clusters behind the last one that is linked; the file is only longer
    space-set-aside
        after space was set aside for metadata: the file is longer, holes of it are zeroes; nothing refers to that

A change of snapshots does not go through ``write_back`` (see ``tools.snapshot_edit``):

    snapshot-header-unwritten
        before the header is written: new tables lie in clusters that are free; the image is what it was
    snapshot-header-unflushed
        between that write and the flush after it: the image is wholly what it was, or wholly what it shall be
    snapshot-clusters-freed
        behind that flush: clusters that are free, and read as zeroes or as what was in them
"""
