"""The ciphers of libgcrypt, for whole sectors in place. No other library that is used here has Serpent and Twofish.

1. The library is looked for when this module is imported, and initialised then; :func:`is_there` says whether it was
   found. Nothing here opens a file later, so what is to run in a sandbox imports this before.
2. Calls keep the interpreter's lock: one takes a fraction of a microsecond, and a second thread that waits for the
   lock would get it after each.
3. Each cipher object belongs to one thread at a time. It holds a key in memory of the library, which overwrites it.
4. No address is kept: a buffer is pinned while the library works in it.

Sources: the Libgcrypt Reference Manual, "Initializing the library", "Working with cipher handles"; ``gcrypt.h``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import cache
from itertools import repeat
from typing import Final

from .geometry import SECTOR_SIZE

_LIBRARY: Final = "libgcrypt.so.20"
_OLDEST: Final = b"1.8.0"
"""The first with XTS."""

# GCRYCTL_* of gcrypt.h
_DISABLE_SECURE_MEMORY: Final = 37
_INITIALIZATION_FINISHED: Final = 38
_IS_INITIALIZATION_FINISHED: Final = 39

_ALGORITHMS: Final = {
    ("aes", 16): 7,
    ("aes", 24): 8,
    ("aes", 32): 9,
    ("twofish", 16): 303,
    ("twofish", 32): 10,
    ("serpent", 16): 304,
    ("serpent", 24): 305,
    ("serpent", 32): 306,
}
"""GCRY_CIPHER_* by name and bytes of a key. The library has no Twofish with keys of 192 bits."""
_MODES: Final = {"ecb": 1, "cbc": 3, "ctr": 6, "xts": 13}
_BLOCK: Final = 16

# Arguments that are converted beforehand halve the time of a call.
_pointer = ctypes.c_void_p.from_param
_size = ctypes.c_size_t.from_param
_SECTOR: Final = _size(SECTOR_SIZE)
_IN_PLACE: Final = _pointer(None), _size(0)
"""The input of a call that works in place."""
_SECTORS_IN_PLACE: Final = repeat(_SECTOR), repeat(_IN_PLACE[0]), repeat(_IN_PLACE[1])


class _Functions:
    """What is called of the library. Raises OSError where it is not there or too old."""

    def __init__(self) -> None:
        library = ctypes.PyDLL(_LIBRARY)
        handle, size, code = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint
        version = library.gcry_check_version
        version.argtypes, version.restype = [ctypes.c_char_p], ctypes.c_char_p
        self.control = library.gcry_control
        self.control.argtypes, self.control.restype = [ctypes.c_int, ctypes.c_int], code
        self.open = library.gcry_cipher_open
        self.open.argtypes = [ctypes.POINTER(handle), ctypes.c_int, ctypes.c_int, ctypes.c_uint]
        self.close = library.gcry_cipher_close
        self.close.argtypes, self.close.restype = [handle], None
        self.test = library.gcry_cipher_algo_info
        self.test.argtypes = [ctypes.c_int, ctypes.c_int, handle, handle]
        self.set_key, self.set_iv, self.set_counter = (
            library.gcry_cipher_setkey,
            library.gcry_cipher_setiv,
            library.gcry_cipher_setctr,
        )
        for function in (self.set_key, self.set_iv, self.set_counter):
            function.argtypes = [handle, ctypes.c_char_p, size]
        # Handle, output and its size, input and its size; see _pointer and _size.
        self.encrypt, self.decrypt = library.gcry_cipher_encrypt, library.gcry_cipher_decrypt
        # Everything but the version returns a gcry_error_t, which is 0 for success.
        for function in (
            self.open,
            self.test,
            self.set_key,
            self.set_iv,
            self.set_counter,
            self.encrypt,
            self.decrypt,
        ):
            function.restype = code
        if version(None) is None or version(_OLDEST) is None:
            raise OSError(f"{_LIBRARY} is too old")
        if not self.control(_IS_INITIALIZATION_FINISHED, 0):
            # Locked memory is scarce, and the keys are in Python's memory as well.
            self.control(_DISABLE_SECURE_MEMORY, 0)
            self.control(_INITIALIZATION_FINISHED, 0)


def _load() -> _Functions | None:
    try:
        return _Functions()
    except (OSError, AttributeError):
        return None


_functions = _load()


def is_there() -> bool:
    """Whether the library was found."""
    return _functions is not None


@cache
def has_cipher(name: str, key_bytes: int) -> bool:
    """Whether the library has a block cipher (``serpent``) with keys of ``key_bytes``; False without the library."""
    algorithm = _ALGORITHMS.get((name, key_bytes))
    # GCRYCTL_TEST_ALGO: in FIPS mode the library has only AES.
    return _functions is not None and algorithm is not None and _functions.test(algorithm, 8, None, None) == 0


class BlockCipher:
    """One cipher, mode and key, which must be there (:func:`has_cipher`). For XTS the key is both of its keys."""

    def __init__(self, name: str, mode: str, key: bytes | bytearray) -> None:
        assert _functions is not None
        self._encrypt, self._decrypt = _functions.encrypt, _functions.decrypt
        self._set_iv = _functions.set_counter if mode == "ctr" else _functions.set_iv
        self._close = _functions.close
        self._handle: int | None = None
        handle = ctypes.c_void_p()
        algorithm = _ALGORITHMS[name, len(key) // 2 if mode == "xts" else len(key)]
        _require(_functions.open(ctypes.byref(handle), algorithm, _MODES[mode], 0))
        self._handle = handle.value
        self._argument = _pointer(handle.value)
        _require(_functions.set_key(handle, bytes(key), len(key)))

    def __del__(self) -> None:
        """Overwrite the key."""
        if getattr(self, "_handle", None) is not None:
            self._close(self._handle)

    def crypt_blocks(self, data: bytearray | memoryview, *, encrypt: bool) -> None:
        """All of ``data``, in mode ECB."""
        pinned = ctypes.c_char.from_buffer(data)
        function = self._encrypt if encrypt else self._decrypt
        _require(function(self._argument, _pointer(ctypes.addressof(pinned)), _size(len(data)), *_IN_PLACE))

    def crypt_sectors(self, data: bytearray | memoryview, ivs: Iterable[bytes], *, encrypt: bool) -> None:
        """The sectors of ``data``, each with its own IV."""
        pinned = ctypes.c_char.from_buffer(data)
        start = ctypes.addressof(pinned)
        handle, argument, set_iv = self._handle, self._argument, self._set_iv
        function = self._encrypt if encrypt else self._decrypt
        for place, iv in zip(range(start, start + len(data), SECTOR_SIZE), ivs, strict=True):
            _require(set_iv(handle, iv, _BLOCK) or function(argument, _pointer(place), _SECTOR, *_IN_PLACE))

    def crypt_numbered(self, data: bytearray | memoryview, first: bytes, *, encrypt: bool) -> None:
        """The sectors of ``data`` in mode XTS, with consecutive numbers as their IVs, from ``first``."""
        pinned = ctypes.c_char.from_buffer(data)
        start = ctypes.addressof(pinned)
        function = self._encrypt if encrypt else self._decrypt
        _require(self._set_iv(self._handle, first, _BLOCK))
        # In XTS the library adds one to the IV after each call.
        places = map(_pointer, range(start, start + len(data), SECTOR_SIZE))
        _require(any(map(function, repeat(self._argument), places, *_SECTORS_IN_PLACE)))


def _require(code: int) -> None:
    # Nothing of this fails for keys and lengths that were checked, but in FIPS mode.
    if code:
        raise RuntimeError(f"libgcrypt failed: error {code & 0xFFFF}")
