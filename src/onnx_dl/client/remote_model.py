"""A model as an application sees it: acquire a worker, send, await, and try elsewhere when told "draining".

Covers lanes and leases of one model in one application.  It is the one place that knows which worker serves
the model now.  Policy (when to load, what to evict) is the supervisor's; onnxruntime's face is
:mod:`onnx_dl.session.inference_session`.
"""

from __future__ import annotations

import errno
import functools
import itertools
import math
import os
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final

from onnx_dl.client.acquisition import Acquisition, Make, Renew
from onnx_dl.client.cancellation import GRACE, Watch, run_timeout
from onnx_dl.client.connection import Connection
from onnx_dl.client.lane_pool import Holds, Serving, close_all
from onnx_dl.concurrency import waits
from onnx_dl.concurrency.deadline import Deadline, DeadlinePassed
from onnx_dl.concurrency.forking import refuse
from onnx_dl.core import load_output
from onnx_dl.core.events import EventType, ModelEvent
from onnx_dl.core.model_files import bytes_of
from onnx_dl.core.settings import Settings
from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import ModelDescription, ModelStatus
from onnx_dl.errors import (
    LoadTimeout,
    ProtocolError,
    ProxyClosedError,
    SupervisorDied,
    SupervisorTimeout,
    UnloadTimeout,
    WorkerDied,
)
from onnx_dl.protocol import control, failures
from onnx_dl.protocol.lane import CallFailed, Draining, Forgotten, Hold, Invoke, Result, Same, Touch, Unhold
from onnx_dl.system import descriptor_limits
from onnx_dl.system.thread_attributes import of_this_thread
from onnx_dl.transport.client_lane import ClientLane

_LOAD_MARGIN: Final = 30.0
"""Seconds beyond the supervisor's own deadline for a load after which a client stops waiting."""
_PAUSE: Final = 0.005
_LONGEST_PAUSE: Final = 0.2
"""Seconds before a worker is asked for once more that took no lane."""
_NO_DESCRIPTOR: Final = (errno.EMFILE, errno.ENFILE)

ANSWERS: Final = (int, Same, Result)

_lease_ids = itertools.count(1)


class Lease:
    """One proxy's claim to its model."""

    def __init__(self, ttl: float, latency: str = "normal", pin: bool = False, priority: int = 0) -> None:
        self.id = next(_lease_ids)
        self.ttl = ttl
        self.latency = latency
        self.pin = pin
        self.priority = priority
        self.granted: control.Granted | None = None
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
        # The connection by a weak reference: it leads to listeners, and one of these may hold the model.
        weakref.finalize(self, _drop, weakref.ref(connection), number).atexit = False


def _drop(connection_ref: weakref.ref[Connection], number: int) -> None:
    """Nobody loads a model from this memory any more."""
    if (connection := connection_ref()) is not None:
        connection.tell(control.DropBlob(number=number))


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
        renew: Callable[[RemoteModel, Connection, Deadline | None], None] | None = None,
        companions: Callable[[], Sequence[RemoteModel]] = tuple,
        spare: Callable[[], bool] = bool,
        is_shared: bool = False,
    ) -> None:
        """``blobs``: the memory that it is loaded from; ``renew``: moves this to the next host when the
        present one is gone; ``companions``: those that this application has in the same group; ``spare``:
        closes idle lanes of all models, and tells whether there were any; ``is_shared``: whether the host is,
        so that callers need not know of its end."""
        self.connection = connection
        self._is_shared = is_shared
        self._renew = renew
        self._companions = companions
        self._spare = spare
        self.spec = spec
        self.description: ModelDescription | None = None
        self._patience = settings.load_timeout + settings.room_timeout + _LOAD_MARGIN
        self._over_zmq = settings.lane == "zmq"
        self._blobs = blobs
        self._acquisition = Acquisition(self._patience)
        self._last: Serving | None = None
        """The worker that was granted last."""
        self._holds = Holds()

    @property
    def _serving(self) -> Serving | None:
        """The worker that serves now."""
        serving = self._last
        return None if serving is None or serving.is_gone else serving

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
            RunTimeout: the deadline of ``watch`` passed during the run.
            DeadlinePassed: it passed before.
            Exception: what onnxruntime raised, as the same class.
        """

        return self._perform(lease, lambda lane: lane.call(outputs, feed, options), watch=watch)

    def keep(self, lease: Lease, outputs: Any, feed: dict[str, Any], options: dict[str, Any] | None) -> Kept:
        """Like :meth:`run`, but the arrays stay where they are, to be fed to other models of this host."""

        def finish(lane: ClientLane, reply: Result | Same) -> Kept:
            return Kept(self, lane, lane.references(reply))

        kept: Kept = self._perform(lease, lambda lane: lane.call(outputs, feed, options, keep=True), finish)
        return kept

    def invoke(self, lease: Lease, method: str, *args: Any, watch: Watch | None = None) -> Any:
        """Another method of the session, by name; raises like :meth:`run`."""
        return self._perform(lease, lambda lane: Invoke(method=method, args=lane.pack(args)), watch=watch)

    def describe(self, lease: Lease) -> ModelDescription:
        """What the model says of itself.  Loads the model if it never was; later it costs no message."""
        if self.description is None or self._is_untouched():
            self._perform(lease, lambda lane: Touch())
        else:
            self._touch()
        assert self.description is not None
        return self.description

    def _is_untouched(self) -> bool:
        """Whether this application has loaded the model, and not used it yet."""
        serving = self._serving
        return serving is not None and not serving.is_opened

    def _touch(self) -> None:
        """A use that the worker need not hear of now."""
        if (serving := self._serving) is not None:
            serving.touch()

    def finish(self, lane: ClientLane, reply: Result | Same | int) -> Any:
        """The values of a reply; the lane is free again."""
        try:
            result = lane.result(reply)
        except BaseException:  # this end does not know what the worker's knows now
            lane.close()
            raise
        self.put_lane(lane)
        return result

    def _perform(
        self,
        lease: Lease,
        make: Callable[[ClientLane], Any],
        finish: Callable[[ClientLane, Any], Any] | None = None,
        watch: Watch | None = None,
    ) -> Any:
        deadline = None if watch is None else watch.deadline
        while True:
            lane, message = self.ask_with(lease, make, deadline)
            done, result = self._exchange(lane, message, finish or self.finish, watch)
            if done:
                return result

    def complete(self, lane: ClientLane, message: Any, watch: Watch) -> tuple[bool, Any]:
        """Sends a request that was made and waits for its result; false: it was not executed, make it again.

        Raises: like :meth:`run`.
        """
        return self._exchange(lane, message, self.finish, watch)

    def ask_with(
        self,
        lease: Lease,
        make: Callable[[ClientLane], Any],
        deadline: Deadline | None = None,
        *,
        wait: bool = True,
    ) -> tuple[ClientLane, Any]:
        """A lane that nobody else uses, and the request made for it, not sent.

        Raises:
            BlockingIOError: not ``wait``, and no lane is idle.
            DeadlinePassed: the deadline did.
            DescriptorsExhausted: this process may open no more files.
            Exception: the caller's values cannot be sent; nothing was.
        """
        for attempt in itertools.count():
            try:
                if (lane := self._take_lane(lease, deadline, wait=wait)) is not None:
                    return lane, self._made(lane, make)
            except OSError as error:
                if error.errno not in _NO_DESCRIPTOR:
                    raise
                if not self._spare():
                    raise descriptor_limits.exhausted(f"A call of {self.spec.name}") from error
            if attempt:  # a worker that closes each lane is gone, which its supervisor does not know yet
                waits.pause(min(_PAUSE * attempt, _LONGEST_PAUSE))
        raise AssertionError("unreachable")

    def _made(self, lane: ClientLane, make: Callable[[ClientLane], Any]) -> Any:
        try:
            return make(lane)
        except Exception:  # the lane is as it was: what a request changes, it changes when it is answered
            self.put_lane(lane)
            raise
        except BaseException:  # Ctrl-C may have come in the midst of a change
            lane.close()
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
        except BaseException as error:
            lane.close()  # KeyboardInterrupt included: the reply is still to come, and is nobody's
            if isinstance(error, OSError) and error.errno in _NO_DESCRIPTOR:
                raise descriptor_limits.exhausted(f"A call of {self.spec.name}") from error
            raise
        self.settle(lane, reply, None if watch is None else watch.deadline)
        return False, None

    def settle(self, lane: ClientLane, reply: Any, deadline: Deadline | None = None) -> None:
        """Looks after a lane whose request has no result.  Returns if the request is to be made again.

        Raises:
            RunTimeout: how the worker ended is not known in time.
            Exception: what the worker raised, or how it ended.
        """
        match reply:
            case CallFailed(failure=failure):
                self.put_lane(lane)
                raise failures.rebuild(failure)
            case Forgotten():
                lane.forget()
                self.put_lane(lane)
                return
            case Draining():
                self._forget(lane.granted)
                lane.close()
                return
        self._forget(lane.granted)
        lane.close()
        self._ask_fate(lane.origin, lane.granted, deadline)

    def terminate(self, lane: ClientLane, deadline: Deadline) -> bool:
        """Has the worker end the call that this lane waits for, as soon as the model lets it.

        Returns whether the worker heard it in time, or is gone and the call with it.
        """
        try:
            other = self._lane_at(lane.origin, lane.granted, deadline)
        except (DeadlinePassed, OSError):  # stopped, or no descriptor is left; closing the lane ends it, too
            return False
        if other is None:
            return True
        try:
            other.exchange(lane.end_of_this(), deadline.left())
        except TimeoutError:
            return False
        finally:
            other.close()
        return True

    def _ask_fate(self, connection: Connection, granted: control.Granted, deadline: Deadline | None) -> None:
        """The worker went without an answer.  Returns if it had drained, so that it never began the call.

        Only the host that granted it knows: another one's workers have the same numbers.
        """
        limit = None
        if deadline is not None:  # a moment, also where the run's own time has just passed
            limit = Deadline(max(GRACE, deadline.left() or 0.0))
        try:
            fate = connection.ask(
                lambda ticket: control.AskFate(ticket=ticket, worker_id=granted.worker_id), deadline=limit
            )
        except DeadlinePassed:
            raise run_timeout(deadline, "lost its worker, whose end is not known yet") from None
        except SupervisorTimeout:
            raise WorkerDied(
                f"The worker of {self.spec.name} (pid {granted.pid}) stopped answering.", pid=granted.pid
            ) from None
        if fate.failure is not None:
            raise failures.rebuild(fate.failure)

    # --- lanes --------------------------------------------------------------------------------------------

    def _take_lane(self, lease: Lease, deadline: Deadline | None, *, wait: bool = True) -> ClientLane | None:
        """A lane that nobody else uses; None if the worker went or did not answer while one was opened: ask
        again."""
        if (lane := self._idle_lane(lease)) is not None:
            # With a bell, the exchange itself tells a call that was never begun.
            if not (lane.over_zmq and lane.is_dead()):
                return lane
            lane.close()
            self._forget(lane.granted)
            return None
        if not wait:
            raise BlockingIOError("no lane is idle")
        if deadline is not None:
            deadline.check("the worker")
        granted = self.acquire(lease, deadline)
        # A proxy that is new to the worker may use the lanes that others left idle.
        return self._idle_lane(lease) or self._open_lane(granted, lease.latency, deadline)

    def _idle_lane(self, lease: Lease) -> ClientLane | None:
        serving = self._last
        if serving is None or not self._may_use(serving, lease):
            return None
        return serving.take(lease.latency)

    def _open_lane(
        self, granted: control.Granted, latency: str, deadline: Deadline | None
    ) -> ClientLane | None:
        """A new lane to the present worker.  None: it is gone, or did not answer and may still."""
        serving = self._serving
        if serving is None or serving.granted is not granted:
            return None
        serving.is_opened = True
        try:
            lane = self._lane_at(serving.connection, granted, deadline, latency)
        except DeadlinePassed:
            if deadline is not None and deadline.passed:
                raise
            return None
        if lane is None:
            self._forget(granted)
        return lane

    def _lane_at(
        self,
        connection: Connection,
        granted: control.Granted,
        deadline: Deadline | None,
        latency: str = "normal",
    ) -> ClientLane | None:
        """A new lane; None: the worker is gone.

        Raises:
            DeadlinePassed: it did not answer in time.
            OSError: no descriptor is left.
        """
        opening = Deadline(connection.timeout, outer=deadline)
        try:
            context = connection.context if self._over_zmq else None
            lane = ClientLane(context, granted, opening, over_zmq=self._over_zmq, latency=latency)
            lane.origin = connection
            return lane
        except (ConnectionError, FileNotFoundError, ProtocolError, SupervisorDied):
            return None  # other errors are ours, no descriptors left for one, and would only come again

    def put_lane(self, lane: ClientLane) -> None:
        """A lane that was taken is free again."""
        serving = self._last
        if serving is None or serving.granted is not lane.granted:
            lane.close()
            return
        serving.put(lane)
        if serving.is_untidy or lane.is_large:
            self.connection.arm()

    def _current(self, lease: Lease) -> control.Granted | None:
        serving = self._last
        return serving.granted if serving is not None and self._may_use(serving, lease) else None

    def _may_use(self, serving: Serving, lease: Lease) -> bool:
        # Whoever is inside of a session() block uses the worker that it holds, also while that waits for
        # the block to end before it unloads: to acquire would wait for the unload, for ever.
        return not serving.is_gone and (lease.granted is serving.granted or bool(self._holds))

    def serves(self, lease: Lease) -> bool:
        """Whether a proxy that has used the present worker may go on to."""
        serving = self._last
        return serving is not None and not self.connection.closed and self._may_use(serving, lease)

    def give_back(self, lease: Lease) -> None:
        """This proxy holds no worker until it uses the model again."""
        lease.granted = None
        self.connection.tell(control.Release(proxy=lease.id))

    def leave_outdated(self, lease: Lease, granted: control.Granted, path: str) -> None:
        """This proxy does not want the worker, because this file is not what that has read."""
        if lease.granted is granted:
            lease.granted = None
        connection = self.connection if self._last is None else self._last.connection
        connection.tell(control.Outdated(proxy=lease.id, worker_id=granted.worker_id, path=path))

    def acquire(self, lease: Lease, deadline: Deadline | None = None) -> control.Granted:
        """A worker for this proxy, loaded if need be.

        Raises:
            DeadlinePassed: ``deadline`` did.  The load goes on.
            Exception: the load failed, or why there is none.
        """
        if granted := self._current(lease):
            return granted
        if lease.closed:
            raise ProxyClosedError(f"The proxy of {self.spec.name} is closed; make a new one.")
        connection, answer = self._ask_until_served(lease, deadline)
        granted = self._accept(lease, answer, connection, deadline)
        if not lease.told:
            lease.told = True
            load_output.repeat(answer.description.details.get("remarks"))
        return granted

    def _ask_until_served(
        self, lease: Lease, deadline: Deadline | None, *, for_host: bool = False
    ) -> tuple[Connection, control.Granted]:
        prepare = functools.partial(self._prepare, lease, for_host)
        try:
            return self._acquisition.ask(
                lease, lambda: self.connection, prepare, self._renewal(), deadline, for_host=for_host
            )
        except (DeadlinePassed, SupervisorTimeout):
            raise
        except TimeoutError as error:
            if isinstance(error, LoadTimeout):
                raise
            raise self._not_loaded(self._patience) from None

    def _renewal(self) -> Renew | None:
        """What moves this to the next host, unless its callers must hear that the present one has died: with
        a connection whose descriptors the program closed, nothing has."""
        lost = not self.connection.usable and self.connection.lost
        renew = self._renew if self._is_shared or lost else None
        return None if renew is None else functools.partial(renew, self)

    def _prepare(self, lease: Lease, for_host: bool) -> Make:
        companions = [model for model in self._companions() if model is not self]
        standing = None if self._is_shared else of_this_thread()
        nbytes = self._file_bytes() + sum(model._file_bytes() for model in companions)
        return lambda ticket: control.Acquire(
            ticket=ticket,
            proxy=lease.id,
            spec=self.spec,
            ttl=lease.ttl,
            file_bytes=nbytes,
            pin=lease.pin,
            priority=lease.priority,
            for_host=for_host,
            companions=[model.spec for model in companions],
            standing=standing,
        )

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
        self._ask_until_served(lease, None, for_host=True)

    def _file_bytes(self) -> int:
        """Of the model's files, those beside it included; 0 where they cannot be looked at."""
        path = self.spec.path
        beside = bytes_of(os.path.join(self.spec.cwd, path)) if path else 0
        return beside + sum(blob.nbytes for blob in self._blobs)

    def _accept(
        self, lease: Lease, answer: control.Granted, connection: Connection, deadline: Deadline | None
    ) -> control.Granted:
        """Notes the worker that serves from now on; one Granted stands for each worker, whoever asked."""
        serving = self._serving
        if serving is None or serving.granted.address != answer.address:
            # Two threads may come here at once with one answer each: who comes first asks once more.
            stale, serving = self._last, Serving(answer, connection)
            self._last = serving
            if stale is not None:
                stale.leave()
        granted = lease.granted = serving.granted
        self.description = answer.description
        if lease.closed:  # closed while it waited: it must not keep what it just got
            connection.tell(control.Release(proxy=lease.id))
        if self._holds:
            self._hold_with(granted, deadline)
        return granted

    def _forget(self, granted: control.Granted) -> None:
        """This worker takes no more calls of ours."""
        serving = self._last
        if serving is not None and serving.granted is granted:
            serving.leave()

    def on_event(self, event: ModelEvent) -> None:
        """Gives back the memory that was shared with a worker that is gone."""
        serving = self._last
        gone = event.type in (EventType.UNLOADED, EventType.FAILED)
        if gone and serving is not None and serving.granted.worker_id == event.worker_id:
            serving.leave()

    def tidy(self, idle_for: float) -> bool:
        """Lets lanes that were idle for so many seconds give their memory back, and closes those beyond the
        one that was used last.  Returns whether there will be more to do."""
        if (serving := self._serving) is None:
            return False
        since = time.perf_counter_ns() - int(idle_for * 1e9)
        surplus, large = serving.untidy()
        idle = [lane for lane in (*surplus, *large) if lane.last_used < since]
        deaf = False  # a worker that does not answer on one lane is asked on no other
        for lane in filter(serving.take_this, idle):
            if deaf or lane in surplus or (deaf := not _trim(lane)):
                lane.close()
            else:
                self.put_lane(lane)
        return len(surplus) + len(large) > len(idle)

    # --- holding ------------------------------------------------------------------------------------------

    def hold(self, lease: Lease, deadline: Deadline | None = None) -> None:
        """Keeps the model loaded until as many :meth:`unhold` as there were holds.

        Raises:
            DeadlinePassed: the deadline did.
        """
        while not self._begin_block(self.acquire(lease, deadline), deadline):
            if deadline is not None:
                deadline.check("the worker")

    def _begin_block(self, granted: control.Granted, deadline: Deadline | None) -> bool:
        self._holds.begin()
        held = False
        try:
            held = self._hold_with(granted, deadline)
        finally:
            if not held:
                close_all(self._holds.end())
        return held

    def unhold(self) -> None:
        """One block ended; with the last one the TTL starts.  Waits for no worker that does not answer."""
        for lane in self._holds.end():
            self._let_go(lane)

    def _let_go(self, lane: ClientLane) -> None:
        try:
            answer = None if lane.is_dead() else lane.exchange(Unhold(), GRACE)
        except (TimeoutError, ProtocolError):
            answer = None
        except BaseException:
            lane.close()
            raise
        if answer is None:
            lane.close()  # which ends the hold, too
        else:
            self.put_lane(lane)

    def _hold_with(self, granted: control.Granted, deadline: Deadline | None) -> bool:
        """Sees to it that a lane holds this worker; false if it drains."""
        if not self._holds.has(granted):
            lane = self._held_lane(granted, deadline)
            if lane is None:
                self._forget(granted)
                return False
            self._holds.put(lane)
        return True

    def _held_lane(self, granted: control.Granted, deadline: Deadline | None) -> ClientLane | None:
        """A new lane that holds this worker; None if it drains or is gone."""
        while (lane := self._open_lane(granted, "normal", deadline)) is None:
            if (serving := self._serving) is None or serving.granted is not granted:
                return None
        try:
            reply = lane.exchange(Hold(), None if deadline is None else deadline.left())
        except BaseException as error:
            lane.close()
            if isinstance(error, TimeoutError):
                raise DeadlinePassed("the worker") from None
            raise
        if isinstance(reply, Result):
            return lane
        lane.close()
        return None

    def load(self, lease: Lease, deadline: Deadline | None = None) -> None:
        """Has the model ready.  A load that nobody needed counts as a use, so that its TTL ends it; with a
        TTL of 0, where a use would, the model waits for its first call."""
        if lease.ttl == 0:
            while self._current(lease) is None:
                self.acquire(lease, deadline)
        else:
            self._perform(
                lease, lambda lane: Touch(), watch=None if deadline is None else Watch(deadline=deadline)
            )

    # --- the rest -----------------------------------------------------------------------------------------

    def unload(self, *, force: bool, deadline: Deadline | None) -> bool:
        """Ends the worker and waits until it is reaped; whether there was one.

        Raises: like :func:`unload`; ReentrantUse: it would wait for a block that this thread is in.
        """
        if not force and deadline is None and self._holds.are_mine:
            refuse(f"in a session() block of {self.spec.name}, which unload() waits for without a timeout")
        answer = unload(self.connection, self.spec.unit, self.spec.name, force=force, deadline=deadline)
        if (serving := self._last) is not None:
            serving.leave()
        return bool(answer.was_loaded)

    def status(self, *, measure: bool = True) -> ModelStatus | None:
        """How the model fares; None if the supervisor does not know it.  Loads nothing."""
        answer = self.connection.ask(lambda ticket: control.AskStatus(ticket=ticket, measure=measure))
        return next((status for status in answer.models if status.key == self.spec.unit), None)

    def shut(self, connection: Connection) -> None:
        """The connection has ended: nothing that is shared with workers is of use any more."""
        if self.connection is not connection:  # it was moved meanwhile
            return
        self._part()

    def move(self, connection: Connection, blobs: Sequence[SharedBlob]) -> None:
        """From now on this is the model at another host.  An answer of the last one that is still on its way
        leads to a worker that is gone, and the model is asked for again."""
        self.connection, self._blobs = connection, blobs
        self._part()

    def _part(self) -> None:
        """Closes every lane to the worker, also those that hold it."""
        if (serving := self._last) is not None:
            serving.leave()
        close_all(self._holds.take())

    def spare(self) -> bool:
        """Closes all idle lanes; whether there were any."""
        return self._last is not None and self._last.drain()

    def retime(self, lease: Lease, ttl: float) -> None:
        """The proxy's TTL from now on."""
        lease.ttl = ttl
        self.connection.tell(control.SetTtl(proxy=lease.id, ttl=ttl))


def unload(
    connection: Connection, key: str, name: str, *, force: bool, deadline: Deadline | None
) -> control.Unloaded:
    """Ends the worker of a model, and waits until it is reaped.

    Raises:
        UnloadTimeout: it was not in time; it still will be.
        SupervisorTimeout: the supervisor does not answer.
    """
    try:
        answer: control.Unloaded = connection.ask(
            lambda ticket: control.Unload(ticket=ticket, key=key, force=force),
            deadline=deadline,
            patience=math.inf,
        )
    except DeadlinePassed:
        seconds = 0.0 if deadline is None else deadline.timeout or 0.0
        raise UnloadTimeout(
            f"{name} was still in use after {seconds:g} seconds; it unloads when the running "
            "calls and session() blocks have ended. unload(force=True) does not wait for them."
        ) from None
    return answer


def _trim(lane: ClientLane) -> bool:
    """Has both ends of an idle lane give their memory back.  A lane that fails ends alone."""
    try:
        return lane.trim()
    except (OSError, ProtocolError):
        return False
