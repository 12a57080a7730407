"""Between pyfuse3 and libfuse: what is found there, what is changed, and that hands are kept off anything odd."""

from __future__ import annotations

import ctypes

import pytest

from qcowfuse.daemon.session import escape_option
from qcowfuse.fuse.libfuse import session_hook
from qcowfuse.fuse.libfuse.callbacks import Callbacks
from qcowfuse.fuse.libfuse.connection import (
    CAP_ATOMIC_O_TRUNC,
    CAP_HANDLE_KILLPRIV_V2,
    CAP_SPLICE_READ,
    CAP_WRITEBACK_CACHE,
    MAX_BACKGROUND,
    ConnectionInfo,
    tune,
    want_killpriv,
)
from qcowfuse.fuse.libfuse.init_reply import (
    HANDLE_KILLPRIV_V2,
    InitReply,
    InitReplyFlag,
    IoVector,
    ReplyHeader,
    set_flag,
)
from qcowfuse.fuse.libfuse.operations_table import OperationsTable, TableCopy
from qcowfuse.fuse.libfuse.session_hook import SESSION_NEW, SessionHook
from qcowfuse.system.import_slot import LoadedObject, SlotError, diverted
from tests.support.libfuse_tables import ADDRESS, connection, library, table

OURS = 0x1122334455667788
ARGUMENTS = ctypes.c_char_p * 1


class FuseArgs(ctypes.Structure):
    """libfuse's ``struct fuse_args``."""

    _fields_ = (("argc", ctypes.c_int), ("argv", ctypes.c_void_p), ("allocated", ctypes.c_int))


def new_session(operations: OperationsTable) -> bytes:
    """What pyfuse3.init does first, without a mount: libfuse's session for a table, through pyfuse3's slot. The bytes
    of libfuse's structure, which has the table in it."""
    libfuse = library()
    name, slot = LoadedObject(libfuse).slot_of(SESSION_NEW)
    words = ARGUMENTS(b"test")
    arguments = FuseArgs(1, ctypes.addressof(words), 0)
    version = (ctypes.c_uint32 * 4)(3, 17)
    call = ctypes.CFUNCTYPE(ctypes.c_void_p, *SESSION_NEW[name])(ctypes.c_size_t.from_address(slot).value)
    given = [ctypes.addressof(arguments), ctypes.addressof(operations), ctypes.sizeof(operations)]
    session: int | None = call(*given, *([ctypes.addressof(version)] if "versioned" in name else []), None)
    assert session is not None
    n_bytes = ctypes.CDLL(None).malloc_usable_size(ctypes.c_void_p(session))
    memory = ctypes.string_at(session, n_bytes)
    libfuse.fuse_session_destroy(ctypes.c_void_p(session))
    return memory


def test_the_slot_of_the_session_is_found() -> None:
    """pyfuse3 as installed has the one reference that the hook needs."""
    name, slot = LoadedObject(library()).slot_of(SESSION_NEW)
    assert name.startswith("fuse_session_new")
    assert slot % 8 == 0


def test_functions_that_are_not_imported_are_refused() -> None:
    """No reference, or more than one, is a surprise."""
    with pytest.raises(SlotError, match="found 0"):
        LoadedObject(library()).slot_of(["no_such_function"])
    with pytest.raises(SlotError, match="found 2"):
        LoadedObject(library()).slot_of(["fuse_reply_err", "fuse_reply_buf"])


def test_a_diversion_is_taken_back() -> None:
    """The slot holds the new target inside of the block, and the old one afterwards."""
    _, slot = LoadedObject(library()).slot_of(SESSION_NEW)
    memory = ctypes.c_size_t.from_address(slot)
    before = memory.value
    with diverted(slot, 0x1234):
        assert memory.value == 0x1234
    assert memory.value == before


def test_a_slot_that_is_not_mapped_is_refused() -> None:
    """Nothing is written where nothing is."""
    with pytest.raises(SlotError):
        diverted(0x10, 1).__enter__()


# ---- the hook ----


def test_libfuse_gets_the_copy() -> None:
    """The caller sees a copy of the table that a session is made with, libfuse makes the session with it, and the
    original stays as it is."""
    seen: list[TableCopy] = []

    def edit(copy: TableCopy) -> None:
        seen.append(copy)
        assert copy.exchange("lseek", OURS) == 0

    hook = SessionHook(library(), Callbacks(), edit)
    original = table()
    with hook.active():
        assert hook.refusal == "pyfuse3 made no session"
        memory = new_session(original)
    assert hook.refusal is None
    assert OURS.to_bytes(8, "little") in memory
    assert len(seen) == 1
    assert seen[0].entries()["lseek"] == OURS
    assert original.lseek is None


def test_a_table_that_is_refused_stays() -> None:
    """When the caller raises, libfuse makes the session with the table of pyfuse3, and the reason is kept."""

    def edit(copy: TableCopy) -> None:
        copy.exchange("lseek", OURS)
        raise SlotError("not today")

    hook = SessionHook(library(), Callbacks(), edit)
    with hook.active():
        assert OURS.to_bytes(8, "little") not in new_session(table())
    assert hook.refusal == "not today"


def test_without_a_slot_the_hook_stands_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the slot is not found, the block runs all the same, and the reason is kept."""
    monkeypatch.setattr(session_hook, "SESSION_NEW", {"no_such_function": ()})
    hook = SessionHook(library(), Callbacks(), lambda copy: None)
    with hook.active():
        pass
    assert "no_such_function" in str(hook.refusal)


def test_a_block_without_a_session_is_no_success() -> None:
    """If no session was made through the slot, nothing was exchanged."""
    hook = SessionHook(library(), Callbacks(), lambda copy: None)
    with hook.active():
        pass
    assert hook.refusal is not None


def test_memory_that_may_not_be_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    """ctypes raises MemoryError then: the block runs, and the reason says it in words."""

    def no_memory(*arguments: object, **named: object) -> object:
        raise MemoryError

    monkeypatch.setattr(ctypes, "CFUNCTYPE", no_memory)
    hook = SessionHook(library(), Callbacks(), lambda copy: None)
    with hook.active():
        pass
    assert hook.refusal == "memory can't be made executable here"


# ---- the table ----


def copy_of(operations: OperationsTable, n_bytes_less: int = 0) -> TableCopy:
    return TableCopy(ctypes.addressof(operations), ctypes.sizeof(operations) - n_bytes_less)


@pytest.mark.parametrize("name", ["init", "fallocate", "copy_file_range", "lseek"])
@pytest.mark.parametrize("changes", [{}, {"lseek": 1}, {"fallocate": 1}, {"flock": 1}, {"poll": 0}, {"access": 0}])
def test_an_entry_is_exchanged(name: str, changes: dict[str, int]) -> None:
    """Whatever else pyfuse3 has come to fill, or to leave empty; the entry itself too."""
    original = table(**changes)
    copy = copy_of(original)
    before = copy.entries()
    assert copy.exchange(name, 0x77) == before[name]
    assert copy.entries() == {**before, name: 0x77}
    assert (getattr(original, name) or 0) == before[name]


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"init": 0}, {"init"}),
        ({"read": 0}, {"fallocate", "copy_file_range", "lseek"}),
        ({"readdirplus": 0}, {"fallocate", "copy_file_range", "lseek"}),
        (dict.fromkeys(["getlk", "ioctl", "flock"], 1), {"fallocate", "copy_file_range", "lseek"}),
    ],
)
def test_an_odd_table_costs_what_it_puts_in_doubt(changes: dict[str, int], refused: set[str]) -> None:
    """Entries that can't be found for sure are left alone; init is the first whatever follows."""
    copy = copy_of(table(**changes))
    for name in ("init", "fallocate", "copy_file_range", "lseek"):
        if name in refused:
            before = copy.entries()
            with pytest.raises(SlotError, match="unexpected table"):
                copy.exchange(name, 0x77)
            assert copy.entries() == before
        else:
            copy.exchange(name, 0x77)


@pytest.mark.parametrize(
    ("n_bytes_less", "refused"),
    [(8, {"lseek"}), (16, {"copy_file_range", "lseek"}), (24, {"fallocate", "copy_file_range", "lseek"})],
)
def test_a_short_table(n_bytes_less: int, refused: set[str]) -> None:
    """A libfuse whose table ends early has no place for the last entries; the others are exchanged."""
    changes = {"readdirplus": ADDRESS}
    copy = copy_of(table(**changes), n_bytes_less)
    for name in ("init", "fallocate", "copy_file_range", "lseek"):
        if name in refused:
            with pytest.raises(SlotError, match=f"too old for {name}|unexpected table"):
                copy.exchange(name, 0x77)
        else:
            copy.exchange(name, 0x77)


def test_a_huge_table_is_refused() -> None:
    """No more is read than a table of operations can have."""
    with pytest.raises(SlotError, match="1048576 bytes"):
        TableCopy(0, 1 << 20)


# ---- the connection ----


def test_tuning() -> None:
    """O_TRUNC is asked, nothing goes through pipes, and more requests may be in flight."""
    tuned = connection()
    assert tune(tuned)
    assert not tuned.want & (CAP_ATOMIC_O_TRUNC | CAP_SPLICE_READ)
    assert tuned.want & CAP_WRITEBACK_CACHE
    assert tuned.max_background == MAX_BACKGROUND


@pytest.mark.parametrize(("major", "capable"), [(8, (1 << 26) - 1), (7, 0)])
def test_an_unknown_connection_loses_the_writeback_cache_only(major: int, capable: int) -> None:
    """Where the connection is not understood, the cache that needs the tuning is off, and the rest stays."""
    unknown = ConnectionInfo(proto_major=major, proto_minor=40, capable=capable, want=CAP_WRITEBACK_CACHE | 1)
    assert not tune(unknown)
    assert unknown.want == 1


def test_killpriv_is_wanted_where_libfuse_knows_it() -> None:
    """libfuse's own flag, when both libfuse and the kernel have it."""
    old, new = connection(), connection(capable=CAP_HANDLE_KILLPRIV_V2 | 1, want=1)
    before = old.want
    assert not want_killpriv(old)
    assert old.want == before
    assert want_killpriv(new)
    assert new.want == CAP_HANDLE_KILLPRIV_V2 | 1


# ---- the reply to INIT ----


def reply(**changes: int) -> tuple[InitReply, ctypes.Array[IoVector], list[object]]:
    body = InitReply(major=changes.get("major", 7), minor=31, flags=1)
    padded = (ctypes.c_char * 64).from_buffer_copy(bytes(body).ljust(64, b"\0"))
    header = ReplyHeader(n_bytes=changes.get("n_bytes", 80), error=changes.get("error", 0), unique=1)
    vectors = (IoVector * 2)(IoVector(ctypes.addressof(header), 16), IoVector(ctypes.addressof(padded), 64))
    return InitReply.from_buffer(padded), vectors, [padded, header]


def test_the_flag_is_set_in_a_reply_to_init() -> None:
    """Only the one flag changes."""
    body, vectors, _keep = reply()
    assert set_flag(ctypes.cast(vectors, ctypes.POINTER(IoVector)), 2)
    assert (body.flags, body.major, body.minor) == (1 | HANDLE_KILLPRIV_V2, 7, 31)


@pytest.mark.parametrize("changes", [{"error": -5}, {"n_bytes": 16}, {"major": 8}])
def test_other_replies_are_left_alone(changes: dict[str, int]) -> None:
    """Whatever does not look like a good reply to INIT is passed on as it is."""
    body, vectors, _keep = reply(**changes)
    assert not set_flag(ctypes.cast(vectors, ctypes.POINTER(IoVector)), 2)
    assert not set_flag(ctypes.cast(vectors, ctypes.POINTER(IoVector)), 1)
    assert body.flags == 1


def test_libfuse_has_one_slot_for_writev() -> None:
    """libfuse as installed sends replies through the slot that the flag needs, and the diversion is taken back."""
    told: list[bool] = []
    flag = InitReplyFlag(library(), Callbacks(), told.append)
    flag.arm()
    flag.disarm()
    assert not told


@pytest.mark.parametrize(
    ("text", "escaped"),
    [("/a/b-c_d.raw", "/a/b-c_d.raw"), ("a,b\\c d", r"a\054b\134c\040d"), ("ä", r"\303\244")],
)
def test_names_are_escaped_for_libfuse(text: str, escaped: str) -> None:
    """Commas, backslashes, blanks and everything that is not ASCII survive libfuse's parsing."""
    assert escape_option(text) == escaped
