"""A model as an application sees it: acquire a worker, send, await, and try elsewhere when told "draining".

Covers lanes and leases of one model in one application.  It is the one place that knows which worker serves
the model now.  Policy (when to load, what to evict) is the supervisor's; onnxruntime's face is
:mod:`onnx_dl.session`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final

from onnx_dl import remarks
from onnx_dl.config import Settings
from onnx_dl.connection import Connection
from onnx_dl.errors import (
    HostClosing,
    LoadTimeout,
    ProtocolError,
    ProxyClosedError,
    SupervisorDied,
    UnloadTimeout,
    WorkerDied,
)
from onnx_dl.events import EventType, ModelEvent
from onnx_dl.external import bytes_of
from onnx_dl.model import ModelDescription, ModelSpec, ModelStatus
from onnx_dl.transport import failures
from onnx_dl.transport import messages as m
from onnx_dl.transport.lane import ClientLane
from onnx_dl.watch import Watch

_LOAD_MARGIN: Final = 30.0
"""Seconds beyond the supervisor's own deadline for a load after which a client stops waiting."""

ANSWERS: Final = (int, m.Same, m.Result)

_lease_ids = itertools.count(1)


class Lease:
    """One proxy's claim to its model."""

    def __init__(self, ttl: float, latency: str = "normal", pin: bool = False, priority: int = 0) -> None:
        self.id = next(_lease_ids)
        self.ttl = ttl
        self.latency = latency
        self.pin = pin
        self.priority = priority
        self.granted: m.Granted | None = None
        self.closed = False
        self.told = False
        """Whether its owner heard what onnxruntime said while it loaded the model."""


class SharedBlob:
    """Memory that a model is loaded from, in the supervisor's hands for as long as this lives."""

    def __init__(self, connection: Connection, name: str, make: Callable[[], int]) -> None:
        """``make``: makes a descriptor of it, which is closed here."""
        fd = make()
        try:
            self.nbytes = os.fstat(fd).st_size
            number = connection.share_blob(name, fd)
        finally:
            os.close(fd)
        weakref.finalize(self, connection.tell, m.DropBlob(number=number)).atexit = False


class Kept:
    """Results that wait in a worker's memory until :meth:`release`.  ``values`` are references to arrays."""

    def __init__(self, model: RemoteModel, lane: ClientLane, values: list[Any]) -> None:
        self.values = values
        self._model = model
        self._lane = lane

    def release(self) -> None:
        """Nobody reads the results any more."""
        self._model.put_lane(self._lane)


class RemoteModel:
    """One model, shared by all proxies of this application that name it."""

    def __init__(
        self,
        connection: Connection,
        spec: ModelSpec,
        settings: Settings,
        blobs: Sequence[SharedBlob] = (),
        renew: Callable[[RemoteModel, Connection], None] | None = None,
        companions: Callable[[], Sequence[RemoteModel]] = tuple,
    ) -> None:
        """``blobs``: the memory that it is loaded from; ``renew``: moves this to the next host when the
        present one is gone, if there may be another; ``companions``: those that this application has in the
        same group."""
        self.connection = connection
        self._renew = renew
        self._companions = companions
        self.spec = spec
        self.description: ModelDescription | None = None
        self._patience = settings.load_timeout + settings.room_timeout + _LOAD_MARGIN
        self._over_zmq = settings.lane == "zmq"
        self._blobs = blobs
        self._lock = threading.Lock()  # brief: guards what follows
        self._granted: m.Granted | None = None
        self._grantor = connection
        """To the host whose worker that is; the present connection may be another by now."""
        self._lanes: list[ClientLane] = []
        self._holds = 0
        self._acquiring = threading.Lock()  # long: one thread at a time asks for a worker
        self._hold_lane: ClientLane | None = None

    # --- calls --------------------------------------------------------------------------------------------

    def run(
        self,
        lease: Lease,
        outputs: Any,
        feed: dict[str, Any],
        options: dict[str, Any] | None,
        watch: Watch | None = None,
    ) -> Any:
        """One inference; arrays in the result are the caller's own.

        Raises:
            WorkerDied: the worker ended during the call, which may have been executed in part.
            RunTimeout: ``watch`` has a deadline, and it passed.
            Exception: what onnxruntime raised, as the same class.
        """

        return self._perform(lease, lambda lane: lane.call(outputs, feed, options), watch=watch)

    def keep(self, lease: Lease, outputs: Any, feed: dict[str, Any], options: dict[str, Any] | None) -> Kept:
        """Like :meth:`run`, but the arrays stay where they are, to be fed to other models of this host."""

        def finish(lane: ClientLane, reply: m.Result | m.Same) -> Kept:
            return Kept(self, lane, lane.references(reply))

        kept: Kept = self._perform(lease, lambda lane: lane.call(outputs, feed, options, keep=True), finish)
        return kept

    def invoke(self, lease: Lease, method: str, *args: Any, watch: Watch | None = None) -> Any:
        """Another method of the session, by name; raises like :meth:`run`."""
        return self._perform(lease, lambda lane: m.Invoke(method=method, args=lane.pack(args)), watch=watch)

    def describe(self, lease: Lease) -> ModelDescription:
        """What the model says of itself.  Loads the model if it never was; later it costs no message."""
        if self.description is None:
            self._perform(lease, lambda lane: m.Touch())
        else:
            self._touch()
        assert self.description is not None
        return self.description

    def _touch(self) -> None:
        """A use that the worker need not hear of now.  If no lane is idle, the model is in use anyway."""
        with contextlib.suppress(IndexError):
            self._lanes[-1].touch()

    def finish(self, lane: ClientLane, reply: m.Result | m.Same | int) -> Any:
        """The values of a reply; the lane is free again."""
        result = lane.result(reply)
        self.put_lane(lane)
        return result

    def _perform(
        self,
        lease: Lease,
        make: Callable[[ClientLane], Any],
        finish: Callable[[ClientLane, Any], Any] | None = None,
        watch: Watch | None = None,
    ) -> Any:
        while True:
            lane, message = self.ask_with(lease, make)
            done, result = self._exchange(lane, message, finish or self.finish, watch)
            if done:
                return result

    def complete(self, lane: ClientLane, message: Any, watch: Watch) -> tuple[bool, Any]:
        """Sends a request that was made and waits for its result; false: it was not executed, make it again.

        Raises: like :meth:`run`.
        """
        return self._exchange(lane, message, self.finish, watch)

    def ask_with(
        self, lease: Lease, make: Callable[[ClientLane], Any], *, wait: bool = True
    ) -> tuple[ClientLane, Any]:
        """A lane that nobody else uses, and the request made for it, not sent.

        Raises:
            BlockingIOError: not ``wait``, and no lane is idle.
            Exception: the caller's values cannot be sent; nothing was.
        """
        while (lane := self._take_lane(lease, wait=wait)) is None:
            continue
        try:
            return lane, make(lane)
        except Exception:
            self.put_lane(lane)
            raise

    def _exchange(
        self,
        lane: ClientLane,
        message: Any,
        finish: Callable[[ClientLane, Any], Any],
        watch: Watch | None = None,
    ) -> tuple[bool, Any]:
        """One request; false if it was not executed and must be made again."""
        try:
            reply = lane.exchange(message) if watch is None else watch.exchange(self, lane, message)
            if isinstance(reply, ANSWERS):
                return True, finish(lane, reply)
        except BaseException:  # KeyboardInterrupt included: the reply is still to come, and is nobody's
            lane.close()
            raise
        self.settle(lane, reply)
        return False, None

    def settle(self, lane: ClientLane, reply: Any) -> None:
        """Looks after a lane whose request has no result.  Returns if the request is to be made again.

        Raises: what the worker raised, or how it ended.
        """
        match reply:
            case m.CallFailed(failure=failure):
                self.put_lane(lane)
                raise failures.rebuild(failure)
            case m.Draining():
                self._forget(lane.granted)
                lane.close()
                return
        self._forget(lane.granted)
        lane.close()
        self._ask_fate(lane.origin, lane.granted)

    def terminate(self, lane: ClientLane) -> None:
        """Has the worker end the call that this lane waits for, as soon as the model lets it."""
        other = self._lane_at(lane.origin, lane.granted)
        if other is None:  # the worker is gone, and the call with it
            return
        try:
            other.exchange(lane.end_of_this())
        finally:
            other.close()

    def _ask_fate(self, connection: Connection, granted: m.Granted) -> None:
        """The worker went without an answer.  Returns if it had drained, so that it never began the call.

        Only the host that granted it knows: another one's workers have the same numbers.
        """
        try:
            fate = connection.ask(lambda ticket: m.AskFate(ticket=ticket, worker_id=granted.worker_id))
        except TimeoutError:
            raise WorkerDied(
                f"The worker of {self.spec.name} (pid {granted.pid}) stopped answering.", pid=granted.pid
            ) from None
        if fate.failure is not None:
            raise failures.rebuild(fate.failure)

    # --- lanes --------------------------------------------------------------------------------------------

    def _take_lane(self, lease: Lease, *, wait: bool = True) -> ClientLane | None:
        """A lane that nobody else uses; None if the worker went while it was opened: ask again."""
        if (lane := self._idle_lane(lease)) is not None:
            # With a bell, the exchange itself tells a call that was never begun.
            if not (lane.over_zmq and lane.is_dead()):
                return lane
            lane.close()
            self._forget(lane.granted)
            return None
        if not wait:
            raise BlockingIOError("no lane is idle")
        granted = self._current(lease) or self._acquire(lease)
        lane = self._open_lane(granted, lease.latency)
        if lane is None:
            self._forget(granted)
        return lane

    def _idle_lane(self, lease: Lease) -> ClientLane | None:
        with self._lock:
            lanes = self._lanes
            if not (lanes and self._may_use(lease)):
                return None
            if lanes[-1].latency == lease.latency:
                return lanes.pop()
            for lane in lanes:
                if lane.latency == lease.latency:
                    lanes.remove(lane)
                    return lane
        return None

    def _open_lane(self, granted: m.Granted, latency: str = "normal") -> ClientLane | None:
        with self._lock:
            connection = self._grantor if self._granted is granted else None
        return None if connection is None else self._lane_at(connection, granted, latency)

    def _lane_at(
        self, connection: Connection, granted: m.Granted, latency: str = "normal"
    ) -> ClientLane | None:
        try:
            lane = ClientLane(
                connection.context, granted, connection.timeout, over_zmq=self._over_zmq, latency=latency
            )
            lane.origin = connection
            return lane
        except (ConnectionError, FileNotFoundError, TimeoutError, ProtocolError):
            return None  # other errors are ours, no descriptors left for one, and would only come again

    def put_lane(self, lane: ClientLane) -> None:
        """A lane that was taken is free again."""
        with self._lock:
            keep = self._granted is lane.granted
            if keep:
                self._lanes.append(lane)
            untidy = len(self._lanes) > 1 or lane.is_large
        if not keep:
            lane.close()
        elif untidy:
            self.connection.arm()

    def _current(self, lease: Lease) -> m.Granted | None:
        with self._lock:
            return self._granted if self._may_use(lease) else None

    def _may_use(self, lease: Lease) -> bool:
        # Whoever is inside of a session() block uses the worker that it holds, also while that waits for
        # the block to end before it unloads: to acquire would wait for the unload, for ever.
        return self._granted is not None and bool(lease.granted is self._granted or self._holds)

    def _acquire(self, lease: Lease) -> m.Granted:
        with self._acquiring:
            if granted := self._current(lease):
                return granted
            if lease.closed:
                raise ProxyClosedError(f"The proxy of {self.spec.name} is closed; make a new one.")
            connection, answer = self._ask_until_served(lease)
            granted = self._accept(lease, answer, connection)
        if not lease.told:
            lease.told = True
            remarks.repeat(answer.description.details.get("remarks"))
        return granted

    def _ask_until_served(self, lease: Lease, *, for_host: bool = False) -> tuple[Connection, m.Granted]:
        """The answer of this host, or of the one that comes after it.  Called while acquiring."""
        deadline = time.monotonic() + self._patience
        while True:
            connection = self.connection
            try:
                return connection, self._ask_for_worker(connection, lease, for_host=for_host)
            except (SupervisorDied, HostClosing):
                # Nothing ran yet, so it may be asked for again.
                if self._renew is None or time.monotonic() >= deadline:
                    raise
                self._renew(self, connection)

    def _ask_for_worker(self, connection: Connection, lease: Lease, *, for_host: bool) -> m.Granted:
        companions = [model for model in self._companions() if model is not self]
        try:
            answer = connection.ask(
                lambda ticket: m.Acquire(
                    ticket=ticket,
                    proxy=lease.id,
                    spec=self.spec,
                    ttl=lease.ttl,
                    file_bytes=self._file_bytes() + sum(model._file_bytes() for model in companions),
                    pin=lease.pin,
                    priority=lease.priority,
                    for_host=for_host,
                    companions=[model.spec for model in companions],
                ),
                self._patience,
            )
        except BaseException as broken:  # Ctrl-C for one: what would be granted now, nobody would give back
            connection.tell(m.Release(proxy=lease.id))
            if isinstance(broken, TimeoutError):
                raise self._not_loaded(self._patience) from None
            raise
        if isinstance(answer, m.Denied):
            error = failures.rebuild(answer.failure)
            remarks.repeat(getattr(error, "remarks", None))
            raise error
        granted: m.Granted = answer
        return granted

    def _not_loaded(self, seconds: float) -> LoadTimeout:
        return LoadTimeout(
            f"{self.spec.name} was not ready after {seconds:g} seconds. Either its load takes longer "
            "(ONNX_DL_LOAD_TIMEOUT), or its old worker must end before, and a call or session() block is in "
            "it: do not use a model for the first time inside of a block that holds its group."
        )

    def adopt(self, lease: Lease) -> None:
        """Has the host itself hold the model, on the lease's terms, also when this application is gone.

        Raises: what the first call would raise.
        """
        with self._acquiring:
            self._ask_until_served(lease, for_host=True)

    def _file_bytes(self) -> int:
        """Of the model's files, those beside it included; 0 where they cannot be looked at."""
        path = self.spec.path
        beside = bytes_of(os.path.join(self.spec.cwd, path)) if path else 0
        return beside + sum(blob.nbytes for blob in self._blobs)

    def _accept(self, lease: Lease, answer: m.Granted, connection: Connection) -> m.Granted:
        """Notes the worker that serves from now on; one Granted stands for each worker, whoever asked."""
        with self._lock:
            stale: list[ClientLane] = []
            if self._granted is None or self._granted.address != answer.address:
                self._granted, stale, self._lanes = answer, self._lanes, []
                self._grantor = connection
            granted = lease.granted = self._granted
            self.description = answer.description
        for lane in stale:
            lane.close()
        if lease.closed:  # closed while it waited: it must not keep what it just got
            connection.tell(m.Release(proxy=lease.id))
        if self._holds:
            self._hold_with(granted)
        return granted

    def _forget(self, granted: m.Granted) -> None:
        """This worker takes no more calls of ours."""
        with self._lock:
            stale: list[ClientLane] = []
            if self._granted is granted:
                self._granted, stale, self._lanes = None, self._lanes, []
        for lane in stale:
            lane.close()

    def on_event(self, event: ModelEvent) -> None:
        """Gives back the memory that was shared with a worker that is gone."""
        granted = self._granted
        gone = event.type in (EventType.UNLOADED, EventType.FAILED)
        if gone and granted is not None and granted.worker_id == event.worker_id:
            self._forget(granted)

    def tidy(self, idle_for: float) -> bool:
        """Lets lanes that were idle for so many seconds give their memory back, and closes those beyond the
        one that was used last.  Returns whether there will be more to do."""
        since = time.perf_counter_ns() - int(idle_for * 1e9)
        with self._lock:
            kept = {lane.latency: lane for lane in self._lanes}
            surplus = [lane for lane in self._lanes if lane is not kept[lane.latency]]
            untidy = [*surplus, *(lane for lane in kept.values() if lane.is_large)]
            idle = [lane for lane in untidy if lane.last_used < since]
            self._lanes = [lane for lane in self._lanes if lane not in idle]
        for lane in idle:
            if lane in surplus or not lane.trim():
                lane.close()
            else:
                self.put_lane(lane)
        return len(untidy) > len(idle)

    # --- holding ------------------------------------------------------------------------------------------

    def hold(self, lease: Lease) -> None:
        """Keeps the model loaded until as many :meth:`unhold` as there were holds."""
        while True:
            granted = self._current(lease) or self._acquire(lease)
            with self._acquiring:
                if granted is self._granted and self._hold_with(granted):
                    self._holds += 1
                    return
            self._forget(granted)

    def unhold(self) -> None:
        """One block ended; with the last one the TTL starts."""
        with self._acquiring:
            self._holds -= 1
            if self._holds or self._hold_lane is None:
                return
            lane, self._hold_lane = self._hold_lane, None
            try:
                answer = None if lane.is_dead() else lane.exchange(m.Unhold())
            except BaseException:
                lane.close()
                raise
            if answer is None:
                lane.close()
            else:
                self.put_lane(lane)

    def _hold_with(self, granted: m.Granted) -> bool:
        """Sees to it that one lane holds this worker; false if it drains.  Called while acquiring."""
        lane, self._hold_lane = self._hold_lane, None
        if lane is not None and (lane.granted is not granted or lane.is_dead()):
            lane.close()
            lane = None
        if lane is None:
            lane = self._open_lane(granted)
            if lane is None:
                return False
            if not isinstance(lane.exchange(m.Hold()), m.Result):
                lane.close()
                return False
        self._hold_lane = lane
        return True

    def load(self, lease: Lease) -> None:
        """Has the model ready.  A load that nobody needed counts as a use, so that its TTL ends it; with a
        TTL of 0, where a use would, the model waits for its first call."""
        if lease.ttl == 0:
            while self._current(lease) is None:
                self._acquire(lease)
        else:
            self._perform(lease, lambda lane: m.Touch())

    # --- the rest -----------------------------------------------------------------------------------------

    def unload(self, *, force: bool, timeout: float | None) -> bool:
        """Ends the worker and waits until it is reaped; whether there was one.

        Raises:
            UnloadTimeout: it was not within ``timeout`` seconds; it still will be.
        """
        deadline = threading.TIMEOUT_MAX if timeout is None else timeout
        try:
            answer = self.connection.ask(
                lambda ticket: m.Unload(ticket=ticket, key=self.spec.unit, force=force), deadline
            )
        except TimeoutError:
            raise UnloadTimeout(
                f"{self.spec.name} was still in use after {timeout:g} seconds; it unloads when the running "
                "calls and session() blocks have ended. unload(force=True) does not wait for them."
            ) from None
        if (granted := self._granted) is not None:
            self._forget(granted)
        return bool(answer.was_loaded)

    def status(self, *, measure: bool = True) -> ModelStatus | None:
        """How the model fares; None if the supervisor does not know it.  Loads nothing."""
        answer = self.connection.ask(lambda ticket: m.AskStatus(ticket=ticket, measure=measure))
        return next((status for status in answer.models if status.key == self.spec.unit), None)

    def leave(self, lease: Lease) -> None:
        """A proxy is closed or collected.  Runs in finalizers, so it takes no lock and waits for nothing."""
        lease.closed = True
        self.connection.tell(m.Release(proxy=lease.id))

    def shut(self, connection: Connection) -> None:
        """The connection has ended: nothing that is shared with workers is of use any more."""
        if self.connection is not connection:  # it was moved meanwhile
            return
        if (granted := self._granted) is not None:
            self._forget(granted)
        with self._acquiring:
            if self.connection is connection:
                self._drop_hold()

    def move(self, connection: Connection, blobs: Sequence[SharedBlob]) -> None:
        """From now on this is the model at another host.  Called while acquiring, or while nobody can be."""
        self.connection, self._blobs = connection, blobs
        if (granted := self._granted) is not None:
            self._forget(granted)
        self._drop_hold()

    def _drop_hold(self) -> None:
        lane, self._hold_lane = self._hold_lane, None
        if lane is not None:
            lane.close()

    def retime(self, lease: Lease, ttl: float) -> None:
        """The proxy's TTL from now on."""
        lease.ttl = ttl
        self.connection.tell(m.SetTtl(proxy=lease.id, ttl=ttl))

    def __del__(self) -> None:
        for lane in (*self._lanes, *([self._hold_lane] if self._hold_lane else [])):
            lane.close()
