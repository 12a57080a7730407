"""``python -m qcowfuse`` is the same as ``qcowfuse``."""

import sys

from .cli.entry import qcowfuse

sys.exit(qcowfuse())
