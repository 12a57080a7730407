"""``python -m qcowfuse`` is the same as ``qcowfuse``."""

import sys

from .cli.main import main

sys.exit(main())
