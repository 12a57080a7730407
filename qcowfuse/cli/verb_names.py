"""The verbs of qcowfuse, and when the first word of a command line is one: all that a plain mount knows of them.

1. A first word that is a verb means the verb. An image file of that name is ``./list``.
2. Where the rest makes no sense for the verb and there is such a file, it is the image after all: see
   :mod:`qcowfuse.cli.verbs.main`. So is every command line that begins with an option, or with ``--``.
"""

from __future__ import annotations

VERBS = {
    "list": "what is mounted, by whom, since when, and in what state",
    "status": "counters, hit rates and what waits, of one mount",
    "umount": "unmount, and return when the image is closed",
    "run": "mount, run a command with the disk, unmount",
}
"""Names and what they do, in the order of the help."""
