"""qcowfuse: a QCOW image as one raw-sized file, read and write, without QEMU and without root.

The packages, each of which imports only from those to its left (a test checks it)::

    errors <- format             <- driver <- export <- cli
    errors <- system  <- storage <- driver
    errors <- system                       <- export, cli

``errors``   every exception that a caller may see, and ``printable``, the way of text to a terminal or a log
``format``   sans I/O: bytes of an image to values and back
``system``   what Linux offers and the standard library lacks
``storage``  bytes at offsets, asynchronously; knows nothing of QCOW
``driver``   the virtual disk: mapping, caches, allocation, copy on write, ordering
``export``   the FUSE file; the only place that knows pyfuse3
``cli``      arguments to open and serve; exit codes; the only reader of the environment

The way of a read: ``AtOnce`` -> ``QcowImage.try_read`` -> ``FileStorage.try_pread``: plain calls, one dictionary
look-up and one ``preadv`` when the L2 slice is cached and the page is. Only a miss costs a coroutine, and then it is
``Operations.read`` -> ``QcowImage.read``.

The way of a write and of fsync, and the rules that make them safe, are in :mod:`qcowfuse.driver`.
"""

from ._version import __version__

__all__ = ["__version__"]
