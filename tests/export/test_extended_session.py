"""The facade: one surprise costs the one part that it concerns, and the state of each part is told."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from typing import Any

import pyfuse3
import pytest
import trio

from qcowfuse.fuse.attributes import Ownership
from qcowfuse.fuse.libfuse import extended_session, init_reply, request_wait
from qcowfuse.fuse.libfuse.connection import CAP_HANDLE_KILLPRIV_V2, CAP_WRITEBACK_CACHE
from qcowfuse.fuse.libfuse.direct_requests import DirectRequests
from qcowfuse.fuse.libfuse.extended_session import ExtendedSession
from qcowfuse.fuse.libfuse.extra_operations import ExtraOperations
from qcowfuse.fuse.libfuse.features import Feature, Features
from qcowfuse.fuse.libfuse.init_reply import InitReplyFlag
from qcowfuse.fuse.operations import Operations
from qcowfuse.fuse.request_gate import RequestGate
from qcowfuse.system.import_slot import SlotError
from tests.support.libfuse_tables import Libfuse, connection
from tests.support.memory_image import MemoryImage

ALL = set(Feature)
UNTIL_INIT = {Feature.WRITEBACK_CACHE, Feature.KILLPRIV}


class Session:
    """A session of a daemon, made with a libfuse that mounts nothing."""

    def __init__(
        self, patch: pytest.MonkeyPatch, libfuse: Libfuse, *, cache: bool = True, version: int = 314
    ) -> None:
        self.libfuse = libfuse
        self._patch = patch
        gate = RequestGate()
        self.operations = Operations(
            MemoryImage(1 << 20), file_name=b"disk.raw", ownership=Ownership(5, 6, 0o600), mtime_ns=0, gate=gate
        )
        patch.setattr(pyfuse3, "trio", trio)
        patch.setattr(pyfuse3, "init", lambda *arguments: None)
        patch.setattr(extended_session, "SessionHook", libfuse.hook)
        patch.setattr(extended_session, "libfuse_version", lambda library: version)
        self.extended = ExtendedSession(self.operations, gate, writeback_cache=cache)
        self.armed: list[Callable[[bool], None]] = []
        if init_reply.InitReplyFlag is InitReplyFlag:
            self._patch_reply()
        self.extended.prepare()
        self.extended.init("/nowhere", set())

    def _patch_reply(self) -> None:
        """No reply of libfuse's is diverted here; what would be told of it is kept."""
        armed = self.armed

        class Flag:
            def __init__(self, library: object, callbacks: object, note: Callable[[bool], None]) -> None:
                self.note = note

            def arm(self) -> None:
                armed.append(self.note)

        self._patch.setattr(init_reply, "InitReplyFlag", Flag)

    @property
    def lacks(self) -> set[Feature]:
        features = self.extended.features
        return {feature for feature in Feature if feature not in features}

    async def main(self) -> None:
        """Serve until the connection ends, at once."""

        async def serve(*arguments: int) -> None:
            return None

        self._patch.setattr(pyfuse3, "main", serve)
        async with trio.open_nursery() as nursery:
            await self.extended.main(1, 2, nursery)


async def test_everything_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a pyfuse3 and a kernel as they are: every part, some only once INIT was answered or requests are read."""
    session = Session(monkeypatch, Libfuse({}))
    assert session.libfuse.changed == {"init", "fallocate", "copy_file_range", "lseek"}
    assert session.lacks == UNTIL_INIT
    assert session.operations.enable_writeback_cache
    session.libfuse.answer_init(connection())
    assert session.libfuse.n_inits == 1
    assert session.lacks == set()
    assert len(session.armed) == 1
    await session.main()
    assert session.lacks == set()
    assert session.extended.statistics() == {
        "libfuse.version": 314,
        **{f"libfuse.{feature}": 1 for feature in Feature},
    }
    assert "no " not in str(session.extended)


@pytest.mark.parametrize(
    ("changes", "n_bytes_less", "lacks"),
    [
        pytest.param({"lseek": 1}, 0, set(), id="pyfuse3 has lseek"),
        pytest.param({"fallocate": 1, "lseek": 1}, 0, set(), id="pyfuse3 has both"),
        pytest.param({"flock": 1}, 0, set(), id="pyfuse3 has flock"),
        pytest.param({"poll": 1}, 0, set(), id="pyfuse3 has poll"),
        pytest.param({"link": 0}, 0, set(), id="pyfuse3 has no link"),
        pytest.param({"copy_file_range": 1}, 0, set(), id="pyfuse3 has copy_file_range"),
        pytest.param({}, 8, {Feature.LSEEK}, id="no place for lseek"),
        pytest.param({}, 16, {Feature.COPY_FILE_RANGE, Feature.LSEEK}, id="no place for copy_file_range"),
        pytest.param(
            {"readdirplus": 0}, 0, {Feature.FALLOCATE, Feature.COPY_FILE_RANGE, Feature.LSEEK}, id="no readdirplus"
        ),
        pytest.param({"init": 0}, 0, {Feature.TUNED_INIT, *UNTIL_INIT}, id="no init"),
    ],
)
async def test_another_table(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, int], n_bytes_less: int, lacks: set[Feature]
) -> None:
    """A pyfuse3 that fills its table differently keeps all that does not depend on the difference."""
    session = Session(monkeypatch, Libfuse(changes, n_bytes_less))
    if "init" not in changes:
        session.libfuse.answer_init(connection())
    await session.main()
    assert session.lacks == lacks
    entries = {
        "init": Feature.TUNED_INIT,
        "fallocate": Feature.FALLOCATE,
        "copy_file_range": Feature.COPY_FILE_RANGE,
        "lseek": Feature.LSEEK,
    }
    assert session.libfuse.changed == {name for name, feature in entries.items() if feature not in lacks}
    assert session.operations.enable_writeback_cache is (Feature.WRITEBACK_CACHE not in lacks)


def failing(exception: Exception) -> Callable[..., Any]:
    def fail(*arguments: object, **named: object) -> object:
        raise exception

    return fail


@pytest.mark.parametrize(
    ("target", "name", "lacks"),
    [
        (ExtraOperations, "lseek_callback", {Feature.LSEEK}),
        (ExtraOperations, "fallocate_callback", {Feature.FALLOCATE}),
        (ExtraOperations, "copy_callback", {Feature.COPY_FILE_RANGE}),
        (init_reply, "InitReplyFlag", {Feature.KILLPRIV}),
        (extended_session, "divert_waits", {Feature.REQUEST_WAIT, Feature.DIRECT_REQUESTS}),
        (extended_session, "DirectRequests", {Feature.DIRECT_REQUESTS}),
        (extended_session, "tune", {Feature.TUNED_INIT, *UNTIL_INIT}),
    ],
)
@pytest.mark.parametrize("exception", [SlotError("odd"), AttributeError("odd"), MemoryError(), KeyError("odd")])
async def test_one_failure_costs_one_part(
    monkeypatch: pytest.MonkeyPatch, target: object, name: str, lacks: set[Feature], exception: Exception
) -> None:
    """Whatever can't be found or made: that part is lacking, with the reason, and the others work."""
    monkeypatch.setattr(target, name, failing(exception))
    session = Session(monkeypatch, Libfuse({}))
    made = connection()
    session.libfuse.answer_init(made)
    await session.main()
    assert session.lacks == lacks
    assert bool(made.want & CAP_WRITEBACK_CACHE) is (Feature.WRITEBACK_CACHE not in lacks)
    reason = session.extended.features.why_not(min(lacks))
    expected = "memory can't be made executable here" if isinstance(exception, MemoryError) else "odd"
    assert expected in str(reason)
    assert session.operations.enable_writeback_cache is (Feature.WRITEBACK_CACHE not in lacks)


async def test_memory_that_may_not_be_executed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No callback can be made: pyfuse3 serves as it is, and one warning says why."""
    monkeypatch.setattr(ctypes, "CFUNCTYPE", failing(MemoryError()))
    session = Session(monkeypatch, Libfuse({}))
    session.extended.report()
    assert session.libfuse.changed == set()
    assert session.lacks == ALL - {Feature.REQUEST_WAIT, Feature.DIRECT_REQUESTS}
    assert not session.operations.enable_writeback_cache
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith("FUSE session not tuned, slower and without discard (no write-back cache either): ")


@pytest.mark.parametrize(
    ("values", "lacks"),
    [
        ({"proto_major": 8}, {Feature.TUNED_INIT, *UNTIL_INIT}),
        ({"proto_minor": 32}, {Feature.KILLPRIV}),
        ({"capable": CAP_WRITEBACK_CACHE - 1, "want": 1}, {Feature.WRITEBACK_CACHE}),
    ],
)
async def test_another_kernel(monkeypatch: pytest.MonkeyPatch, values: dict[str, int], lacks: set[Feature]) -> None:
    """What the connection does not have is lacking, and Operations knows of the write-back cache what is true."""
    session = Session(monkeypatch, Libfuse({}))
    session.libfuse.answer_init(connection(**values))
    await session.main()
    assert session.lacks == lacks
    assert session.operations.enable_writeback_cache is (Feature.WRITEBACK_CACHE not in lacks)


def test_the_cache_that_nobody_wants(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without the write-back cache by choice: not a word but in the state."""
    session = Session(monkeypatch, Libfuse({}), cache=False)
    assert not session.operations.enable_writeback_cache
    session.extended.report()
    made = connection()
    made.want &= ~CAP_WRITEBACK_CACHE  # as pyfuse3 leaves it then
    session.libfuse.answer_init(made)
    assert not session.operations.enable_writeback_cache
    assert session.lacks == {Feature.WRITEBACK_CACHE}
    assert "it is not wanted" in str(session.extended)
    assert not caplog.records


@pytest.mark.parametrize("has_it", [True, False])
def test_libfuse_has_the_flag_itself(monkeypatch: pytest.MonkeyPatch, has_it: bool) -> None:
    """From 3.17 on nothing is diverted: libfuse is asked, and the kernel has it or not."""
    session = Session(monkeypatch, Libfuse({}), version=317)
    capable = (1 << 20) - 1 | has_it * CAP_HANDLE_KILLPRIV_V2
    made = connection(capable=capable)
    session.libfuse.answer_init(made)
    assert (Feature.KILLPRIV not in session.lacks) is has_it
    assert bool(made.want & CAP_HANDLE_KILLPRIV_V2) is has_it
    assert not session.armed


def test_a_reply_that_is_odd_costs_killpriv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below 3.17 it is only known once the reply goes out."""
    session = Session(monkeypatch, Libfuse({}))
    session.libfuse.answer_init(connection())
    assert Feature.KILLPRIV not in session.lacks
    session.armed[0](False)
    assert Feature.KILLPRIV in session.lacks


async def test_a_refusal_while_serving_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers at once may come to an end with any request; the state says so from then on."""
    made = []
    real = DirectRequests

    def make(*arguments: Any) -> object:
        made.append(real(*arguments))
        return made[0]

    monkeypatch.setattr(extended_session, "DirectRequests", make)
    session = Session(monkeypatch, Libfuse({}))
    assert Feature.DIRECT_REQUESTS not in session.lacks
    made[0].refusal = "libfuse's buffer is of an odd size"
    assert session.extended.statistics()["libfuse.direct_requests"] == 0
    assert "no direct_requests: libfuse's buffer is of an odd size" in str(session.extended)


def test_handlers_that_pyfuse3_came_to_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its entry can't be exchanged, a pyfuse3 that has lseek gets its own answer, not our method with other
    arguments."""

    async def own(self: object, fh: int, off: int, whence: int) -> str:
        return f"pyfuse3's, {fh} {off} {whence}"

    monkeypatch.setattr(pyfuse3.Operations, "lseek", own, raising=False)
    monkeypatch.setattr(ExtraOperations, "lseek_callback", failing(SlotError("odd")))
    session = Session(monkeypatch, Libfuse({"lseek": 1}))
    called: Any = session.operations.lseek
    assert trio.run(called, 1, 2, 3) == "pyfuse3's, 1 2 3"


def test_pyfuse3_waits_at_the_gate_before_it_makes_a_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """pyfuse3 3.4 makes its lock in init: the stand-in for trio is there by then, and has what else trio has."""
    seen: list[Any] = []
    libfuse = Libfuse({})
    session = Session(monkeypatch, libfuse)
    monkeypatch.setattr(pyfuse3, "trio", trio)
    monkeypatch.setattr(pyfuse3, "init", lambda *arguments: seen.append(pyfuse3.trio))  # type: ignore[attr-defined]
    gate = RequestGate()
    extended = ExtendedSession(session.operations, gate, writeback_cache=True)
    extended.prepare()
    extended.init("/nowhere", set())
    (stand_in,) = seen
    assert stand_in.Lock is request_wait.NoLock
    assert stand_in.lowlevel.wait_readable == gate.wait_readable
    assert stand_in.sleep is trio.sleep
    assert stand_in.lowlevel.checkpoint is trio.lowlevel.checkpoint


def test_what_stands_on_another_part() -> None:
    """It goes with that, for the same reason, and can't be there without it."""
    features = Features()
    for feature in Feature:
        features.gain(feature)
    assert not features.why_not(Feature.WRITEBACK_CACHE)
    features.lose(Feature.TUNED_INIT, "a reason")
    assert features.why_not(Feature.WRITEBACK_CACHE) == "a reason"
    assert Feature.LSEEK in features
    features.gain(Feature.WRITEBACK_CACHE)
    assert Feature.WRITEBACK_CACHE not in features
