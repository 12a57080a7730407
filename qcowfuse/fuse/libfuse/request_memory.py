"""The memory that requests are read into: libfuse's buffers, and more of the same that is lent to threads.

1. A buffer of libfuse's is used once libfuse itself has received a request with it, and only if that looked as it
   must: so memory and layout are known.
2. libfuse frees the memory of its buffers in the end. So whatever is put in the place of it comes from malloc(3), and
   has the same size.
3. Memory that is lent belongs to the thread that it was lent to, until that gives it back: to add to a list and to
   take from it are single steps to other threads. What is kept for the next one is bounded.
"""

from __future__ import annotations

import ctypes
import mmap

from ...system.import_slot import SlotError

MIN_BYTES = (128 << 10) + mmap.PAGESIZE
MAX_BYTES = (64 << 20) + mmap.PAGESIZE
_MAX_SPARE = 4


class FuseBuf(ctypes.Structure):
    """The head of libfuse's ``struct fuse_buf``, which has been the same since 3.0."""

    size: int
    flags: int
    mem: int | None

    _fields_ = (("size", ctypes.c_size_t), ("flags", ctypes.c_int), ("mem", ctypes.c_void_p))


class RequestBuffer:
    """A buffer of libfuse's with memory at ``address``, of which ``view`` is all that is read into."""

    __slots__ = ("address", "fuse_buf", "n_usable", "view", "views")

    def __init__(self, fuse_buf: FuseBuf, address: int, n_usable: int) -> None:
        """``n_usable``: bytes of the memory, whole pages of which are read into."""
        self.fuse_buf = fuse_buf
        self.n_usable = n_usable
        self.use(address)

    def use(self, address: int) -> None:
        """Have other memory in the place of it, of the same size."""
        self.address = self.fuse_buf.mem = address
        n_bytes = self.n_usable & -mmap.PAGESIZE
        self.view = memoryview((ctypes.c_char * n_bytes).from_address(address)).cast("B")
        self.views = (self.view,)


class Loan:
    """The memory that ``buffer`` has now, on its way to a thread."""

    __slots__ = ("_address", "_buffer", "_memory")

    def __init__(self, memory: RequestMemory, buffer: RequestBuffer) -> None:
        self._memory = memory
        self._buffer = buffer
        self._address = buffer.address

    def give_back(self) -> None:
        """The thread has done with it."""
        self._memory.keep(self._address, self._buffer.n_usable)

    def undo(self) -> None:
        """There is no such thread: the buffer has its memory again."""
        self._memory.keep(self._buffer.address, self._buffer.n_usable)
        self._buffer.use(self._address)


class RequestMemory:
    """What the C library says and does about memory. Raises AttributeError where it can't."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        self._usable_size = library.malloc_usable_size
        self._usable_size.argtypes, self._usable_size.restype = (ctypes.c_void_p,), ctypes.c_size_t
        self._malloc, self._free = library.malloc, library.free
        self._malloc.argtypes, self._malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
        self._free.argtypes, self._free.restype = (ctypes.c_void_p,), None
        self._spare: list[tuple[int, int]] = []

    @property
    def n_spare(self) -> int:
        """Blocks that are kept for the next ones."""
        return len(self._spare)

    def buffer_of(self, address: int, n_bytes: int) -> RequestBuffer:
        """The buffer at ``address`` that libfuse has just received a request of ``n_bytes`` with (rule 1). Raises
        SlotError for what is not as it must be."""
        fuse_buf = FuseBuf.from_address(address)
        if fuse_buf.size != n_bytes or fuse_buf.flags or not fuse_buf.mem:
            raise SlotError("libfuse's buffer is of an unknown kind")
        n_usable = self._usable_size(fuse_buf.mem)
        if not MIN_BYTES <= n_usable & -mmap.PAGESIZE <= MAX_BYTES:
            raise SlotError("libfuse's buffer is of an odd size")
        return RequestBuffer(fuse_buf, fuse_buf.mem, n_usable)

    def lend(self, buffer: RequestBuffer) -> Loan | None:
        """Part ``buffer`` from its memory, with what it holds. None where there is no other memory for it: then
        nothing has changed."""
        n_usable = buffer.n_usable
        try:
            address, n_spare = self._spare.pop()
        except IndexError:
            address, n_spare = 0, 0
        if n_spare != n_usable:  # of another size, which is rare, or none at all
            self._free(address)
            address = self._malloc(n_usable)
            if not address:
                return None
        loan = Loan(self, buffer)
        buffer.use(address)
        return loan

    def keep(self, address: int, n_usable: int) -> None:
        """Take memory that nobody uses any more; any thread may call this."""
        if len(self._spare) < _MAX_SPARE:
            self._spare.append((address, n_usable))
        else:
            self._free(address)

    def release(self) -> None:
        """Free what is spare: nothing is lent any more."""
        while self._spare:
            self._free(self._spare.pop()[0])
