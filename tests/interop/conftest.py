"""A folder in memory for each test that builds images."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture
def image_folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder, on a tmpfs where there is one; gone after the test."""
    if not SHARED_MEMORY.is_dir():
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="qcowfuse-test-", dir=SHARED_MEMORY))
    yield folder
    shutil.rmtree(folder)
