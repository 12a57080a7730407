"""A storage that need not be durable: a flush waits for no disk, and still tells of what was lost."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qcowfuse.storage import throw_away
from qcowfuse.storage.throw_away import ThrowAwayFile


async def test_a_flush_syncs_nothing_and_tells_of_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No fsync of any kind; an error of written pages is final, as it is for other files."""

    def forbidden(fd: int) -> None:
        raise AssertionError("a throw-away file was synced")

    monkeypatch.setattr(os, "fdatasync", forbidden)
    monkeypatch.setattr(os, "fsync", forbidden)
    file = ThrowAwayFile(os.open(tmp_path, os.O_TMPFILE | os.O_RDWR), str(tmp_path / "x"), writable=True)
    try:
        await file.pwritev(0, [b"abc" * 100_000])
        await file.flush()
        await file.flush()
        assert file.counters.flushes == 2
        assert file.try_flush()
        assert file.counters.flushes == 3

        def failing(fd: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(throw_away, "written_back_without_error", failing)
        with pytest.raises(OSError, match="Input/output error"):
            await file.flush()
        assert not file.try_flush()
        monkeypatch.undo()
        assert not file.try_flush()
        with pytest.raises(OSError, match="an earlier flush"):
            await file.flush()
    finally:
        await file.aclose()
