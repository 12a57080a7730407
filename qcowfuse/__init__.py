"""qcowfuse: a QCOW image as one raw-sized file, read and write, without QEMU and without root.

The packages, from the lowest to the highest; each imports only from those above it in this list (a test checks it)::

    errors, buffer,     every exception that a caller may see; what bytes are passed around in;
    printable           the way of text to a terminal or a log
    format              sans I/O: bytes of an image to values and back
    partitions          sans I/O: bytes of a disk to its partitions
    system              what Linux offers and the standard library lacks
    storage             bytes at offsets, asynchronously; knows nothing of QCOW
      measuring         storages with a known delay, or in memory
    tables              the tables of an image, read through a storage
    consistency         check and repair
    driver              the virtual disk: ``image`` (what others see of it), ``options``, ``files``,
                        ``overlay``, ``partition_window``
      layers            mapping, caches, ciphers, data files, claims
      reading           guest data out of a chain of images
      writing           allocation, write-back, rules R1 to R5
      (facade)          ``qcow_image``, ``chain``, ``opened_layers``, ``assembly``, ``counters``
    tools               info, map, check, create, snapshots: images at rest; overlays
    fuse                one disk as one file: operations, errnos
      libfuse           what pyfuse3 has no public way for
    daemon              mount, serve, end; the process outside of the mount; the sandbox
    cli                 arguments to open and serve; exit codes; the only reader of the environment
      mount, img        the two programs
      verbs             what else qcowfuse can be told: list, status, umount, run

The way of a read: ``DirectRequests`` -> ``QcowImage.start_read`` -> ``FileStorage.try_pread``: plain calls, one
dictionary look-up and one ``preadv`` when the L2 slice is cached and the page is. Only a miss costs a coroutine:
``start_read`` gives a ``PendingRead``, and ``Operations.read`` awaits its end, or a thread hands the bytes to the
kernel (``replies``).

The way of a write and of fsync, and the rules that make them safe, are in :mod:`qcowfuse.driver`.
"""

from ._version import __version__

__all__ = ["__version__"]
