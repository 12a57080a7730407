"""Bytes at offsets, asynchronously: the layer below the image drivers, which knows nothing of QCOW.

1. Inline where the kernel can answer at once, io_uring or a worker thread where it can't; which of them is found
   out once, at open (``file``). An event loop that waits for a disk serves nobody.
2. A storage is used from one trio thread only. It holds no lock: overlapping writes are the caller's affair.
3. ``OSError`` is what comes out, untouched; a failed flush is final (``base``, rule 4).

``base`` is the protocol, ``file`` the real thing (with ``blocking``, whole transfers, ``inline_reads``, and
``file_systems``, what lies below), ``blocking_file`` the one without an event loop, ``opened_file`` what both have in
common, ``opening`` which of them it is, ``flushes`` how it is made durable (``durability``: what is known of that,
``held``: a lock), ``opened`` what regular files and block devices differ in, ``beneath`` files found by names from
strangers, ``workers`` its threads, ``calls_in_flight`` what goes on in them, ``ring`` reads and flushes by io_uring
(``restricted_ring``: it does nothing else), ``space`` room set aside, ``reserve`` room kept free, ``throw_away`` a
file that need not be durable, ``syscalls`` what the standard library lacks, ``locks`` the image locks that QEMU
understands, ``lock_reach`` who sees them over a network. The package ``measuring`` has storages that wrap another
one.
"""
