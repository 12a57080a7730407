"""The hook around the making of a FUSE session: what it finds, what it changes, and that it keeps its hands off."""

from __future__ import annotations

import ctypes

import pyfuse3
import pytest

from qcowfuse.daemon.session import escape_option
from qcowfuse.fuse.libfuse import session_hook
from qcowfuse.fuse.libfuse.init_reply import (
    HANDLE_KILLPRIV_V2,
    InitReplyFlag,
    _InitReply,
    _IoVector,
    _ReplyHeader,
    _set_flag,
)
from qcowfuse.fuse.libfuse.session_hook import (
    CAP_ATOMIC_O_TRUNC,
    CAP_SPLICE_READ,
    CAP_WRITEBACK_CACHE,
    MAX_BACKGROUND,
    ConnectionInfo,
    OperationsTable,
    SessionHook,
    tune,
)
from qcowfuse.system.import_slot import LoadedObject, SlotError, diverted


@pytest.fixture
def library() -> ctypes.CDLL:
    return ctypes.CDLL(pyfuse3.__file__)


def test_the_slot_of_the_session_is_found(library: ctypes.CDLL) -> None:
    """pyfuse3 as installed has the one reference that the hook needs."""
    name, slot = LoadedObject(library).slot_of(session_hook._SESSION_NEW)
    assert name.startswith("fuse_session_new")
    assert slot % 8 == 0


def test_functions_that_are_not_imported_are_refused(library: ctypes.CDLL) -> None:
    """No reference, or more than one, is a surprise."""
    with pytest.raises(SlotError, match="found 0"):
        LoadedObject(library).slot_of(["no_such_function"])
    with pytest.raises(SlotError, match="found 2"):
        LoadedObject(library).slot_of(["fuse_reply_err", "fuse_reply_buf"])


def test_a_diversion_is_taken_back(library: ctypes.CDLL) -> None:
    """The slot holds the new target inside of the block, and the old one afterwards."""
    _, slot = LoadedObject(library).slot_of(["fuse_session_new", "fuse_session_new_versioned"])
    memory = ctypes.c_size_t.from_address(slot)
    before = memory.value
    with diverted(slot, 0x1234):
        assert memory.value == 0x1234
    assert memory.value == before


def test_a_slot_that_is_not_mapped_is_refused() -> None:
    """Nothing is written where nothing is."""
    with pytest.raises(SlotError):
        diverted(0x10, 1).__enter__()


def table(**changes: int) -> OperationsTable:
    """A table as pyfuse3 fills it, with some changes."""
    operations = OperationsTable()
    for name in session_hook._TABLE:
        if name not in session_hook._EMPTY_IN_PYFUSE3:
            setattr(operations, name, 0x1000)
    for name, value in changes.items():
        setattr(operations, name, value)
    return operations


def test_the_table_gets_our_init_in_a_copy() -> None:
    """The original table stays as it is, the copy differs in init only."""
    original = table()
    hook = SessionHook()
    address = hook._complete_table(ctypes.addressof(original), ctypes.sizeof(original))
    copy = OperationsTable.from_address(address)
    different = [name for name in session_hook._TABLE if getattr(copy, name) != getattr(original, name)]
    assert different == ["init"]
    assert original.init == 0x1000


@pytest.mark.parametrize("changes", [{"lseek": 1}, {"fallocate": 1}, {"read": 0}, {"init": 0}])
def test_an_unexpected_table_is_refused(changes: dict[str, int]) -> None:
    """A table that differs from what pyfuse3 fills today is not touched."""
    changed = table(**changes)
    with pytest.raises(SlotError, match=next(iter(changes))):
        SessionHook()._complete_table(ctypes.addressof(changed), ctypes.sizeof(changed))


def test_a_short_table_is_refused() -> None:
    """A libfuse whose table ends early is too old."""
    short = table()
    with pytest.raises(SlotError, match="too old"):
        SessionHook()._complete_table(ctypes.addressof(short), ctypes.sizeof(short) - 8)


def test_without_a_slot_the_hook_stands_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the slot is not found, the block runs all the same, and the reason is kept."""
    monkeypatch.setattr(session_hook, "_SESSION_NEW", {"no_such_function": ctypes.CFUNCTYPE(None)})
    hook = SessionHook()
    with hook.active():
        pass
    assert "no_such_function" in str(hook.refusal)


def test_a_block_without_a_session_is_no_success() -> None:
    """If no session was made through the slot, nothing is tuned."""
    hook = SessionHook()
    with hook.active():
        pass
    assert hook.refusal is not None


def test_tuning() -> None:
    """O_TRUNC is asked, nothing goes through pipes, and more requests may be in flight."""
    everything = (1 << 26) - 1
    connection = ConnectionInfo(proto_major=7, proto_minor=40, capable=everything, want=everything)
    assert tune(connection)
    assert not connection.want & (CAP_ATOMIC_O_TRUNC | CAP_SPLICE_READ)
    assert connection.want & CAP_WRITEBACK_CACHE
    assert connection.max_background == MAX_BACKGROUND


@pytest.mark.parametrize(("major", "capable"), [(8, (1 << 26) - 1), (7, 0)])
def test_an_unknown_connection_loses_the_writeback_cache_only(major: int, capable: int) -> None:
    """Where the connection is not understood, the cache that needs the tuning is off, and the rest stays."""
    connection = ConnectionInfo(proto_major=major, proto_minor=40, capable=capable, want=CAP_WRITEBACK_CACHE | 1)
    assert not tune(connection)
    assert connection.want == 1


def reply(**changes: int) -> tuple[_InitReply, ctypes.Array[_IoVector], list[object]]:
    body = _InitReply(major=changes.get("major", 7), minor=31, flags=1)
    padded = (ctypes.c_char * 64).from_buffer_copy(bytes(body).ljust(64, b"\0"))
    header = _ReplyHeader(n_bytes=changes.get("n_bytes", 80), error=changes.get("error", 0), unique=1)
    vectors = (_IoVector * 2)(_IoVector(ctypes.addressof(header), 16), _IoVector(ctypes.addressof(padded), 64))
    return _InitReply.from_buffer(padded), vectors, [padded, header]


def test_the_flag_is_set_in_a_reply_to_init() -> None:
    """Only the one flag changes."""
    body, vectors, _keep = reply()
    assert _set_flag(ctypes.cast(vectors, ctypes.POINTER(_IoVector)), 2)
    assert (body.flags, body.major, body.minor) == (1 | HANDLE_KILLPRIV_V2, 7, 31)


@pytest.mark.parametrize("changes", [{"error": -5}, {"n_bytes": 16}, {"major": 8}])
def test_other_replies_are_left_alone(changes: dict[str, int]) -> None:
    """Whatever does not look like a good reply to INIT is passed on as it is."""
    body, vectors, _keep = reply(**changes)
    assert not _set_flag(ctypes.cast(vectors, ctypes.POINTER(_IoVector)), 2)
    assert not _set_flag(ctypes.cast(vectors, ctypes.POINTER(_IoVector)), 1)
    assert body.flags == 1


def test_libfuse_has_one_slot_for_writev(library: ctypes.CDLL) -> None:
    """libfuse as installed sends replies through the slot that the flag needs."""
    assert not InitReplyFlag(library).was_set


@pytest.mark.parametrize(
    ("text", "escaped"),
    [("/a/b-c_d.raw", "/a/b-c_d.raw"), ("a,b\\c d", r"a\054b\134c\040d"), ("ä", r"\303\244")],
)
def test_names_are_escaped_for_libfuse(text: str, escaped: str) -> None:
    """Commas, backslashes, blanks and everything that is not ASCII survive libfuse's parsing."""
    assert escape_option(text) == escaped
