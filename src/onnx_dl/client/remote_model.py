"""A model as an application sees it: gets a worker, calls it, and tries again when that drains."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from onnx_dl.client.acquisition import Acquisition, Lease, SharedBlob
from onnx_dl.client.cancellation import CancelWatch
from onnx_dl.client.connection import Connection
from onnx_dl.client.current_worker import CurrentWorker
from onnx_dl.client.lane_pool import LanePool
from onnx_dl.client.pending_call import NO_DESCRIPTOR, RETRY, PendingCall, RetainedOutputs, abandon
from onnx_dl.client.remote_claims import RemoteClaims
from onnx_dl.concurrency import waits
from onnx_dl.concurrency.deadline import Deadline, DeadlinePassed
from onnx_dl.concurrency.forking import refuse
from onnx_dl.core import load_output
from onnx_dl.core.settings import Settings
from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import ModelDescription, ModelStatus
from onnx_dl.errors import ProxyClosedError, UnloadTimeout
from onnx_dl.protocol import control
from onnx_dl.protocol.lane import Invoke, Touch
from onnx_dl.system import descriptor_limits
from onnx_dl.tensors.call_codec import Request
from onnx_dl.tensors.call_plans import EngineValue, Feed
from onnx_dl.transport.call_channel import SAME
from onnx_dl.transport.client_lane import ClientLane

_PAUSE, _LONGEST_PAUSE = 0.005, 0.2
"""Seconds until a worker is acquired once more that opened no lane."""

Encode = Callable[[ClientLane], Request]
"""Makes a request for a lane."""


class HostServices(NamedTuple):
    """Services that a model needs of the host object that it belongs to."""

    renew: Callable[[RemoteModel, Connection, Deadline | None], None]
    """Moves the model to the next host when the one of this connection is gone."""
    companions: Callable[[], Sequence[RemoteModel]]
    """The application's models in the same group."""
    close_idle_lanes: Callable[[], bool]
    """Closes the idle lanes of all models; whether there were any."""
    is_shared: bool
    """True if the host is shared, so that callers need not know of its end."""


class RemoteModel(RemoteClaims):
    """One model, shared by all proxies of this application that name it."""

    def __init__(
        self,
        connection: Connection,
        spec: ModelSpec,
        settings: Settings,
        host: HostServices,
        blobs: Sequence[SharedBlob] = (),
    ) -> None:
        """``blobs``: memory that the model is loaded from."""
        self.spec = spec
        self.description: ModelDescription | None = None
        self._host = host
        acquisition = Acquisition(spec, connection, settings, blobs, is_shared=host.is_shared)
        # A sandboxed worker cannot connect to the sockets that lanes over ZeroMQ need.
        over_zmq = settings.lane == "zmq" and not spec.sandbox
        super().__init__(acquisition, CurrentWorker(spec.name, over_zmq=over_zmq, copies=spec.sandbox))

    def run(
        self,
        lease: Lease,
        outputs: EngineValue,
        feed: Feed,
        options: dict[str, EngineValue] | None,
        watch: CancelWatch | None = None,
    ) -> EngineValue:
        """One inference; arrays in the result are the caller's own.

        Raises:
            WorkerDied: the worker ended during the call, which may have been executed in part.
            RunTimeout, DeadlinePassed: the deadline of ``watch`` passed during the run, or before it.
            Exception: what onnxruntime raised, as the same class.
        """
        return self._perform(lease, lambda lane: lane.codec.encode_call(outputs, feed, options), watch)

    def repeat(self, lease: Lease, outputs: EngineValue, feed: Feed) -> list[EngineValue] | None:
        """One inference as by :meth:`run`, in fewer steps, if it is like the last one on an idle lane.

        None: it was not executed, and must be made by :meth:`run`.  Raises like that.
        """
        pool = self.worker.usable_by(lease)
        if pool is None or pool.over_zmq or lease.closed or self._acquisition.connection.closed:
            return None
        lanes = pool.idle[lease.terms.latency]
        try:
            lane = lanes.pop()
        except IndexError:
            return None
        pending = None
        try:
            plan = lane.codec.repeated(outputs, feed)
            if plan is None:
                pool.put(lane)
                return None
            reply = lane.repeat(plan.number)
            if reply != SAME:
                pending = PendingCall(pool, lane, plan)
            else:
                assert plan.repeated is not None  # nobody else uses the lane
                results = plan.repeated.results()
        except BaseException as error:  # KeyboardInterrupt included: the reply is still to come
            abandon(pool, lane, error)
            raise
        if pending is not None:
            result = pending.conclude(reply)
            return None if result is RETRY else result
        lanes.append(lane)
        if pool.is_gone:
            pool.close_idle()
        elif lane.was_large or len(lanes) > 1:
            pool.connection.arm()
        return results

    def keep(
        self, lease: Lease, outputs: EngineValue, feed: Feed, options: dict[str, EngineValue] | None
    ) -> RetainedOutputs:
        """Like :meth:`run`, but the arrays stay where they are, to be fed to other models of this host."""
        retained: RetainedOutputs = self._perform(
            lease, lambda lane: lane.codec.encode_call(outputs, feed, options, keep=True), retain=True
        )
        return retained

    def invoke(
        self, lease: Lease, method: str, *args: EngineValue, watch: CancelWatch | None = None
    ) -> EngineValue:
        """Calls another method of the session by name; raises like :meth:`run`."""
        return self._perform(lease, lambda lane: Invoke(method=method, args=lane.codec.pack(args)), watch)

    def describe(self, lease: Lease) -> ModelDescription:
        """The model's description.  Loads the model if it never was loaded; later it costs no message."""
        pool = self.worker.pool
        # A worker that this application has loaded and not used yet must be told of the first use.
        if self.description is None or (pool is not None and not pool.is_opened):
            self._perform(lease, lambda lane: Touch())
        elif pool is not None:
            pool.touch()
        assert self.description is not None
        return self.description

    def _perform(
        self, lease: Lease, encode: Encode, watch: CancelWatch | None = None, *, retain: bool = False
    ) -> EngineValue:
        deadline = None if watch is None else watch.deadline
        while True:
            result = self.prepare(lease, encode, deadline).perform(watch, retain=retain)
            if result is not RETRY:
                return result

    def prepare(
        self, lease: Lease, encode: Encode, deadline: Deadline | None = None, *, wait: bool = True
    ) -> PendingCall:
        """Takes a lane that nobody else uses and makes the request for it, which is not sent.

        Raises:
            BlockingIOError: not ``wait``, and no lane is idle.
            DeadlinePassed: the deadline did.
            DescriptorsExhausted: this process may open no more files.
            Exception: the caller's values cannot be sent; nothing was.
        """
        for attempt in itertools.count():
            try:
                pool = self.worker.usable_by(lease)
                lane = None if pool is None else pool.take(lease.terms.latency)
                if lane is None:
                    if not wait:
                        raise BlockingIOError("no lane is idle")
                    if deadline is not None:
                        deadline.check("the worker")
                    pool = self.acquire(lease, deadline)
                    # A proxy that is new to the worker may use the lanes that others left idle.
                    lane = pool.take(lease.terms.latency) or pool.open(lease.terms.latency, deadline)
                if pool is not None and lane is not None:
                    return _encoded(pool, lane, encode)
            except OSError as error:
                if error.errno not in NO_DESCRIPTOR:
                    raise
                if not self._host.close_idle_lanes():
                    raise descriptor_limits.exhausted(f"A call of {self.spec.name}") from error
            if attempt:  # a worker that closes each lane is gone, which its supervisor does not know yet
                waits.pause(min(_PAUSE * attempt, _LONGEST_PAUSE))
        raise AssertionError("unreachable")

    def serves(self, lease: Lease) -> bool:
        """True if a proxy that has used the present worker may go on to."""
        return self.worker.usable_by(lease) is not None and not self._acquisition.connection.closed

    def acquire(self, lease: Lease, deadline: Deadline | None = None) -> LanePool:
        """A worker for this proxy, loaded if need be.  Raises like :meth:`Acquisition.ask`."""
        if (pool := self.worker.usable_by(lease)) is not None:
            return pool
        if lease.closed:
            raise ProxyClosedError(f"The proxy of {self.spec.name} is closed; make a new one.")
        connection, answer = self._ask(lease, deadline)
        pool = self.worker.accept(answer, connection)
        lease.granted = pool.granted
        self.description = answer.description
        if lease.closed:  # closed while it waited: it must not keep what it just got
            connection.send(control.Release(proxy=lease.id))
        if self.worker.holds:
            self.worker.holds.hold(pool, deadline)
        if not lease.has_load_output:
            lease.has_load_output = True
            load_output.repeat(answer.description.details.get("remarks"))
        return pool

    def grant(self, lease: Lease, deadline: Deadline | None = None) -> control.Granted:
        """The grant of a worker for this proxy.  Raises like :meth:`acquire`."""
        return self.acquire(lease, deadline).granted

    def _ask(
        self, lease: Lease, deadline: Deadline | None, *, for_host: bool = False
    ) -> tuple[Connection, control.Granted]:
        def companions() -> Iterable[Acquisition]:
            return (model._acquisition for model in self._host.companions())

        renew = functools.partial(self._host.renew, self)
        return self._acquisition.ask(lease, companions, renew, deadline, for_host=for_host)

    def adopt(self, lease: Lease) -> None:
        """Has the host itself hold the model on these terms, also when this application is gone."""
        self._ask(lease, None, for_host=True)

    def load(self, lease: Lease, deadline: Deadline | None = None) -> None:
        """Has the model ready.  A load that nobody needed counts as a use, so that its TTL ends it; with a
        TTL of 0, where a use would, the model waits for its first call."""
        if lease.terms.ttl == 0:
            while self.worker.usable_by(lease) is None:
                self.acquire(lease, deadline)
        else:
            watch = None if deadline is None else CancelWatch(deadline=deadline)
            self._perform(lease, lambda lane: Touch(), watch)

    def hold(self, lease: Lease, deadline: Deadline | None = None) -> None:
        """Keeps the model loaded until :meth:`unhold`; may raise DeadlinePassed.  Holds nest."""
        while not self.worker.holds.begin(self.acquire(lease, deadline), deadline):
            if deadline is not None:
                deadline.check("the worker")

    def unhold(self) -> None:
        """Ends one hold; with the last one the TTL starts.  Waits only briefly for the worker."""
        self.worker.holds.end()

    def unload(self, *, force: bool, deadline: Deadline | None) -> bool:
        """Ends the worker and waits until it is reaped; whether there was one.  Raises like :func:`unload`,
        and ReentrantUse where it would wait for a block that this thread is in."""
        if not force and deadline is None and self.worker.holds.are_mine:
            refuse(f"in a session() block of {self.spec.name}, which unload() waits for without a timeout")
        answer = unload(self.connection, self.spec.unit, self.spec.name, force=force, deadline=deadline)
        self.worker.retire()
        return answer.was_loaded

    def status(self, *, measure: bool = True) -> ModelStatus | None:
        """The model's status; None if the supervisor does not know the model.  Loads nothing."""
        answer = self.connection.ask(lambda ticket: control.AskStatus(ticket=ticket, measure=measure))
        return next((status for status in answer.models if status.key == self.spec.unit), None)

    def move(self, connection: Connection, blobs: Sequence[SharedBlob]) -> None:
        """Makes this the model at another host.  An answer of the last host that is still under way leads to
        a worker that is gone, and the model is asked for again."""
        self._acquisition.move(connection, blobs)
        self.worker.leave()


def _encoded(pool: LanePool, lane: ClientLane, encode: Encode) -> PendingCall:
    try:
        return PendingCall(pool, lane, encode(lane))
    except Exception:  # the lane is as it was: what a request changes, it changes when it is answered
        pool.put(lane)
        raise
    except BaseException:  # Ctrl-C may have come in the midst of a change
        lane.close()
        raise


def unload(
    connection: Connection, key: str, name: str, *, force: bool, deadline: Deadline | None
) -> control.Unloaded:
    """Ends the worker of a model, and waits until it is reaped.  Raises UnloadTimeout if that was not in time
    (it still will be), and SupervisorTimeout."""
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
