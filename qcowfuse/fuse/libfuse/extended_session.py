"""The one session of pyfuse3, with what it has no public way for: the facade of this package.

1. Nothing is raised but what pyfuse3 raises. What can't be had is lacking in :attr:`ExtendedSession.features`, costs
   what stands on it and nothing else, and the session serves without.
2. All callbacks are made before the mount. Where no memory may be executed, libffi looks for a file to map instead,
   in every mount that it finds: in this one, which nobody serves yet, it would wait for ever.
3. The kernel and INIT have the last word on the write-back cache and on KILLPRIV: until then these count as lacking.
4. There is one session in the life of a process: libfuse and pyfuse3 keep addresses and names of what is made here.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pyfuse3
import trio

from ..operations import Operations
from ..request_gate import RequestGate
from .callbacks import Callbacks
from .connection import CAP_WRITEBACK_CACHE, FIRST_WITH_KILLPRIV_V2, ConnectionInfo, tune, want_killpriv
from .direct_requests import DirectRequests
from .extra_operations import ExtraOperations
from .features import Feature, Features, reason_of
from .operations_table import TableCopy
from .request_wait import divert_waits
from .session_hook import SessionHook, wrap_init

_UNTUNED = "FUSE session not tuned, slower and without discard (no write-back cache either): %s"
_COSTS = {
    Feature.TUNED_INIT: (logging.WARNING, "FUSE session not tuned, slower (no write-back cache either): %s"),
    Feature.FALLOCATE: (logging.WARNING, "FUSE session without discard: %s"),
    Feature.LSEEK: (logging.WARNING, "FUSE session that shows no holes (SEEK_DATA, SEEK_HOLE): %s"),
    Feature.COPY_FILE_RANGE: (logging.INFO, "copies within the mount go through the kernel: %s"),
    Feature.KILLPRIV: (logging.INFO, "each write will be two requests: %s"),
    Feature.REQUEST_WAIT: (logging.INFO, "requests are waited for as pyfuse3 does, slower: %s"),
}
"""What a user is told of :meth:`ExtendedSession.init`. The write-back cache stands on one of these."""
_BY_TABLE = (Feature.TUNED_INIT, Feature.FALLOCATE, Feature.LSEEK, Feature.COPY_FILE_RANGE, Feature.KILLPRIV)
"""What needs another table of operations than pyfuse3's."""
_NO_INIT = "INIT has not been answered"
_MIN_KILLPRIV_MINOR = 33
"""Of the kernel's protocol. A kernel that is older has another use for the flag, or none."""

_log = logging.getLogger(__name__)


class ExtendedSession:
    """``prepare``, ``init``, ``report``, ``main``; the object is kept until after ``pyfuse3.close``."""

    def __init__(self, operations: Operations, gate: RequestGate, *, writeback_cache: bool) -> None:
        """``writeback_cache``: whether the kernel may have one."""
        self.version = 0
        """libfuse's, as ``fuse_version`` gives it: 314 is 3.14. 0 until it is known."""
        self._operations = operations
        self._gate = gate
        self._wants_cache = writeback_cache
        self._features = Features()
        self._callbacks = Callbacks()
        self._extra = ExtraOperations(operations, gate)
        self._direct: DirectRequests | None = None
        self._while_serving = ExitStack()
        self._library: ctypes.CDLL | None = None
        self._arm_reply: Callable[[], None] | None = None

    @property
    def features(self) -> Features:
        """The state of every part."""
        if self._direct is not None and self._direct.refusal is not None:
            self._features.lose(Feature.DIRECT_REQUESTS, self._direct.refusal)
        return self._features

    def statistics(self) -> dict[str, int]:
        """The state as counters."""
        return {"libfuse.version": self.version, **self.features.statistics()}

    def __str__(self) -> str:
        """One line for the log."""
        version = f"{self.version // 100}.{self.version % 100}" if self.version else "of unknown version"
        return f"libfuse {version}, pyfuse3 {pyfuse3.__version__}: {self.features}"

    # ---- making the session ----

    def prepare(self) -> None:
        """What needs no table of operations: how requests are waited for, and read."""
        with self._costs(Feature.REQUEST_WAIT):
            divert_waits(self._gate)
        reason = self._features.why_not(Feature.REQUEST_WAIT)
        if reason is not None:
            self._features.lose(Feature.DIRECT_REQUESTS, reason)
            return
        with self._costs(Feature.DIRECT_REQUESTS):
            direct = DirectRequests(self._operations, self._gate)
            self._while_serving.enter_context(direct.active())
            self._direct = direct
        reason = self._features.why_not(Feature.DIRECT_REQUESTS)
        if reason is not None:
            _log.info("requests go the long way, small ones are slower: %s", reason)

    def init(self, target: str, options: set[str]) -> None:
        """``pyfuse3.init``, extended. Raises what that raises."""
        try:
            with self._table_exchanged():
                pyfuse3.init(self._operations, target, options)
        except BaseException:
            self._while_serving.close()
            raise

    @contextmanager
    def _table_exchanged(self) -> Iterator[None]:
        features = self._features
        with ExitStack() as stack:
            hook = None
            with self._costs(*_BY_TABLE):
                # pyfuse3's own object leads to the very libfuse that it uses.
                self._library = ctypes.CDLL(pyfuse3.__file__)
                self.version = libfuse_version(self._library)
                hook = SessionHook(self._library, self._callbacks, self._edit)
                stack.enter_context(hook.active())
            yield
        if hook is not None and hook.refusal is not None:
            for feature in _BY_TABLE:
                features.lose(feature, hook.refusal)
        self._keep_pyfuse3_off()
        if self._direct is not None:
            self._direct.answers_lseek = Feature.LSEEK in features
            self._direct.answers_fallocate = Feature.FALLOCATE in features
        if not self._wants_cache:
            features.lose(Feature.WRITEBACK_CACHE, "it is not wanted")
        else:
            features.lose(Feature.WRITEBACK_CACHE, features.why_not(Feature.TUNED_INIT) or _NO_INIT)
        self._operations.enable_writeback_cache = self._wants_cache and Feature.TUNED_INIT in features

    @contextmanager
    def _costs(self, *features: Feature) -> Iterator[None]:
        """What the block prepares. If that fails, these are lacking, and whatever comes after goes on."""
        try:
            yield
        except Exception as exc:
            for feature in features:
                self._features.lose(feature, reason_of(exc))
        else:
            for feature in features:
                self._features.gain(feature)

    def _edit(self, table: TableCopy) -> None:
        library, callbacks = self._library, self._callbacks
        assert library is not None
        with self._costs(Feature.FALLOCATE):
            table.exchange("fallocate", self._extra.fallocate_callback(library, callbacks))
        with self._costs(Feature.LSEEK):
            table.exchange("lseek", self._extra.lseek_callback(library, callbacks))
        with self._costs(Feature.COPY_FILE_RANGE):
            table.exchange("copy_file_range", self._extra.copy_callback(library, callbacks))
        with self._costs(Feature.KILLPRIV):
            self._prepare_killpriv(library)
        with self._costs(Feature.TUNED_INIT):
            wrap_init(table, callbacks, self._react_to_init)
        if Feature.KILLPRIV in self._features:
            self._features.lose(Feature.KILLPRIV, self._features.why_not(Feature.TUNED_INIT) or _NO_INIT)

    def _prepare_killpriv(self, library: ctypes.CDLL) -> None:
        if self.version < FIRST_WITH_KILLPRIV_V2:
            from .init_reply import InitReplyFlag

            self._arm_reply = InitReplyFlag(library, self._callbacks, self._note_reply).arm

    def _keep_pyfuse3_off(self) -> None:
        """A pyfuse3 that has come to know an operation calls ours with arguments of its own, where its entry in the
        table is not exchanged. Then it gets the answer of its own base class."""
        for feature in (Feature.FALLOCATE, Feature.LSEEK):
            own = getattr(pyfuse3.Operations, feature.value, None)
            if own is not None and feature not in self._features:
                setattr(self._operations, feature.value, own.__get__(self._operations))

    def report(self) -> None:
        """After :meth:`init`: log what is lacking, and what that costs."""
        why_not = self._features.why_not
        said = {None, _NO_INIT}
        if why_not(Feature.TUNED_INIT) is not None and why_not(Feature.FALLOCATE) is not None:
            _log.warning(_UNTUNED, why_not(Feature.TUNED_INIT))
            said.add(why_not(Feature.TUNED_INIT))
        for feature, (level, text) in _COSTS.items():
            if why_not(feature) not in said:
                _log.log(level, text, why_not(feature))

    # ---- INIT ----

    def _react_to_init(self, connection: ConnectionInfo) -> None:
        """Runs while libfuse answers INIT, after pyfuse3's own handler."""
        features = self._features
        with self._costs(Feature.TUNED_INIT):
            if not tune(connection):
                raise LookupError("the FUSE connection is not of a kind that qcowfuse knows")
        reason = features.why_not(Feature.TUNED_INIT)
        if reason is not None:
            connection.want &= ~CAP_WRITEBACK_CACHE  # see STANDS_ON
            features.lose(Feature.WRITEBACK_CACHE, reason)
            features.lose(Feature.KILLPRIV, reason)
            _log.warning("%s: not tuned", reason)
        elif connection.want & CAP_WRITEBACK_CACHE:
            features.gain(Feature.WRITEBACK_CACHE)
        elif self._wants_cache:
            features.lose(Feature.WRITEBACK_CACHE, "the kernel has none")
        self._operations.enable_writeback_cache = Feature.WRITEBACK_CACHE in features
        if features.why_not(Feature.KILLPRIV) == _NO_INIT:
            self._set_killpriv(connection)

    def _set_killpriv(self, connection: ConnectionInfo) -> None:
        with self._costs(Feature.KILLPRIV):
            if self._arm_reply is None:
                if not want_killpriv(connection):
                    raise LookupError("the kernel does not have it")
            elif connection.proto_minor < _MIN_KILLPRIV_MINOR:
                raise LookupError("the kernel is too old")
            else:
                self._arm_reply()
        reason = self._features.why_not(Feature.KILLPRIV)
        if reason is not None:
            _log.log(*_COSTS[Feature.KILLPRIV], reason)

    def _note_reply(self, was_set: bool) -> None:
        if not was_set:
            self._features.lose(Feature.KILLPRIV, "the answer to INIT is not what it should be")

    # ---- serving ----

    async def main(self, min_tasks: int, max_tasks: int, nursery: trio.Nursery) -> None:
        """``pyfuse3.main``, extended. Raises what that raises. ``nursery`` runs requests that pyfuse3 does not know;
        it must be closed before ``pyfuse3.close``."""
        self._extra.nursery = nursery
        with self._while_serving:
            try:
                await pyfuse3.main(min_tasks, max_tasks)
            finally:
                if self._direct is not None:
                    await self._direct.wait_until_ended()


def libfuse_version(library: ctypes.CDLL) -> int:
    """314 for 3.14; 0 where it can't be asked."""
    try:
        return int(library.fuse_version())
    except AttributeError:
        return 0
