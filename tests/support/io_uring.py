"""Whether this kernel lets us use io_uring."""

from __future__ import annotations

import pytest

from qcowfuse.storage.ring import load_binding

from .container import is_contained, lacks


def need_io_uring() -> None:
    """Skip where the kernel refuses. A missing binding is no reason: it is installed with everything else."""
    try:
        load_binding().Context(1)
    except (OSError, SystemError) as error:
        if is_contained():
            lacks(f"io_uring: {error}")
        pytest.skip(f"this kernel refuses io_uring: {error}")
