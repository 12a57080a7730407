"""The errno table: every exception that we raise on purpose has an errno, and nothing else has."""

from __future__ import annotations

import errno
import inspect

import pytest

from qcowfuse import errors
from qcowfuse.fuse.errnos import errno_of

EXAMPLES: list[tuple[errors.QcowFuseError, int]] = [
    (errors.QcowFuseError("x"), errno.EIO),
    (errors.FormatError("header", 0, "x"), errno.EIO),
    (errors.UnsupportedFeatureError(["x"]), errno.EIO),
    (errors.CorruptImageError("L2 entry", 512, "x"), errno.EIO),
    (errors.ImageUsageError("x"), errno.EINVAL),
    (errors.WrongKeyError("x"), errno.EINVAL),
    (errors.ReadOnlyImageError("x"), errno.EROFS),
    (errors.OutOfRangeError("x"), errno.EINVAL),
    (errors.ImageLockedError("p", "x"), errno.EBUSY),
    (errors.BackingChainError("p", "x"), errno.EIO),
    (errors.MountError("x"), errno.EIO),
    (errors.StoppedEarlyError("x"), errno.EIO),
]


@pytest.mark.parametrize(("exc", "number"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_own_exceptions(exc: errors.QcowFuseError, number: int) -> None:
    """Each exception of ours gives the errno that a user of a file expects."""
    assert errno_of(exc) == number


def test_every_own_exception_is_covered() -> None:
    """The examples above name all classes of errors.py."""
    classes = {cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, Exception)}
    assert classes == {type(exc) for exc, _ in EXAMPLES}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.ENOMEM, errno.EFBIG])
def test_system_errors_keep_their_errno(number: int) -> None:
    """An OSError of the storage reaches the guest as it is."""
    assert errno_of(OSError(number, "x")) == number


@pytest.mark.parametrize("exc", [OSError("x"), OSError(errno.ENOSYS, "x"), OSError(0, "x"), OSError(-5, "x")])
def test_errnos_that_the_kernel_must_not_see_become_eio(exc: OSError) -> None:
    """No errno, nonsense, and ENOSYS, which would turn the operation off for good, are EIO."""
    assert errno_of(exc) == errno.EIO


def test_no_memory() -> None:
    """MemoryError is ENOMEM."""
    assert errno_of(MemoryError()) == errno.ENOMEM


@pytest.mark.parametrize("exc", [ValueError("x"), KeyError("x"), AssertionError(), RuntimeError("x")])
def test_anything_else_is_a_bug(exc: Exception) -> None:
    """What nobody raises on purpose has no errno."""
    assert errno_of(exc) is None
