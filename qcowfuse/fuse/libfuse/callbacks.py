"""Python functions as addresses that libfuse can call, which takes memory that may be executed.

A callback lives as long as its :class:`Callbacks`: libfuse keeps the bare address. What libfuse calls must never
raise, since ctypes swallows the exception.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from ...system.import_slot import SlotError
from .features import NOT_EXECUTABLE


class Callbacks:
    """Makes callbacks and keeps them."""

    def __init__(self) -> None:
        self._kept: list[object] = []

    def address(self, function: Callable[..., Any], result: Any, *arguments: Any, errno: bool = False) -> int:
        """The address of ``function`` for C code that does not hold the interpreter's lock; the types are ctypes'.
        With ``errno``, ctypes' copy of errno is swapped in around the call.

        Raises SlotError where no memory may be executed.
        """
        try:
            callback = ctypes.CFUNCTYPE(result, *arguments, use_errno=errno)(function)
        except MemoryError:
            raise SlotError(NOT_EXECUTABLE) from None
        address = ctypes.cast(callback, ctypes.c_void_p).value
        if not address:
            raise SlotError("a callback without an address")
        self._kept.append(callback)
        return address

    def keep(self, thing: object) -> None:
        """Something else that libfuse has the address of."""
        self._kept.append(thing)
