"""An io_uring that can do nothing but read and flush: seccomp does not see what goes through a ring.

1. The kernel takes restrictions only from a ring that was made disabled. The binding has no option for that, so its
   call of io_uring_setup is diverted while it makes the ring (:mod:`~qcowfuse.system.import_slot`).
2. Whatever is not as expected leaves a ring without restrictions, which works as well; the log says so.

Source: io_uring_register(2), linux/io_uring.h.
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

from ..system.import_slot import LoadedObject, SlotError, diverted

_SETUP: Final = 425
_REGISTER: Final = 427
_FLAGS_OFFSET: Final = 8
_SETUP_R_DISABLED: Final = 1 << 6
_REGISTER_RESTRICTIONS: Final = 11
_REGISTER_ENABLE_RINGS: Final = 12
_RESTRICTION_SQE_OP: Final = 1
_OP_FSYNC: Final = 3
_OP_READ: Final = 22

_log = logging.getLogger(__name__)
_LONG = ctypes.c_long
_SYSCALL = ctypes.CFUNCTYPE(_LONG, *[_LONG] * 7, use_errno=True)


def restricted_context(binding: ModuleType, n_operations: int) -> Any:
    """A context of the binding for ``n_operations`` at a time, whose ring only reads and flushes, if it can.

    Raises what the binding raises.
    """
    try:
        library = ctypes.CDLL(binding.__file__)
        _, slot = LoadedObject(library).slot_of(["syscall"])
        setup = _DisabledSetup()
        diversion = diverted(slot, setup.address)
        diversion.__enter__()
    except (SlotError, OSError, AttributeError, MemoryError, TypeError) as error:
        _log.debug("io_uring is not restricted to reads and flushes: %s", error)
        return binding.Context(n_operations)
    try:
        context = binding.Context(n_operations)
    finally:
        diversion.__exit__(None, None, None)
    if setup.ring >= 0:
        _restrict(setup.ring)
    return context


class _DisabledSetup:
    """The system call function that the binding calls meanwhile; ``ring`` is the descriptor that was made."""

    def __init__(self) -> None:
        self.ring = -1
        self._syscall = _system_call()
        self._callback = _SYSCALL(self._call)
        self.address = ctypes.cast(self._callback, ctypes.c_void_p).value or 0

    def _call(self, number: int, *arguments: int) -> int:
        if number != _SETUP:
            return self._syscall(number, *arguments)
        flags = ctypes.c_uint32.from_address(arguments[1] + _FLAGS_OFFSET)
        flags.value |= _SETUP_R_DISABLED
        self.ring = self._syscall(number, *arguments)
        return self.ring


def _system_call() -> Callable[..., int]:
    function = ctypes.CDLL(None, use_errno=True).syscall
    function.restype = _LONG
    function.argtypes = [_LONG] * 7
    return function


def _restrict(ring: int) -> None:
    """Allow reads and flushes alone, then let the ring begin. Raises OSError where it can't begin."""
    call = _system_call()
    allowed = [struct.pack("=HBB3I", _RESTRICTION_SQE_OP, opcode, 0, 0, 0, 0) for opcode in (_OP_READ, _OP_FSYNC)]
    restrictions = ctypes.create_string_buffer(b"".join(allowed))
    if call(_REGISTER, ring, _REGISTER_RESTRICTIONS, ctypes.addressof(restrictions), len(allowed), 0, 0) < 0:
        _log.debug("io_uring is not restricted to reads and flushes: %s", os.strerror(ctypes.get_errno()))
    if call(_REGISTER, ring, _REGISTER_ENABLE_RINGS, 0, 0, 0, 0) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"io_uring: {os.strerror(number)}")
