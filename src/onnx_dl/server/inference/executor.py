"""The one way of an inference from a request to its response.

:meth:`Executor.infer` is for coroutines, :meth:`Executor.infer_blocking` for threads; all but the waits is
the same, and is in :class:`_Course`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from typing import Final

from onnx_dl.client.host_client import HostClient
from onnx_dl.concurrency.deadline import Deadline, DeadlinePassed
from onnx_dl.core.types import Value
from onnx_dl.errors import LoadTimeout, ProxyClosedError, RunTimeout
from onnx_dl.server.inference import checks, long_steps, outputs, runs
from onnx_dl.server.inference.bodies import FREE_UP_TO, Bodies
from onnx_dl.server.inference.failures import failure_of, own_failure
from onnx_dl.server.inference.heap import HeapTrimmer
from onnx_dl.server.inference.limits import Limits
from onnx_dl.server.inference.loads import Loads
from onnx_dl.server.inference.memory import RegionUses
from onnx_dl.server.inference.preparation import MAX_BODY, Preparations, Prepared
from onnx_dl.server.inference.statistics import Durations, Statistics
from onnx_dl.server.inference.threads import Threads
from onnx_dl.server.interfaces import Models, Served, VersionStatistics
from onnx_dl.server.shm.regions import Regions
from onnx_dl.server.v2 import json_outputs
from onnx_dl.server.v2.failures import RequestFailure, cancelled, internal, passed
from onnx_dl.server.v2.messages import InferRequest, InferResponse, RegionSlice
from onnx_dl.session import placed_runs

_ATTEMPTS: Final = 3
"""Versions that are tried, one after the other, because each was replaced before its run began."""
_OF_CALLERS: Final = (RunTimeout, DeadlinePassed, TimeoutError)
"""Classes of errors that only a request's own timeout raises, or its caller who goes."""


class Executor:
    """Makes inferences.  Thread-safe."""

    def __init__(
        self,
        models: Models,
        regions: Regions,
        statistics: Statistics,
        limits: Limits,
        host: HostClient,
        max_body: int = MAX_BODY,
    ) -> None:
        self._models = models
        self.regions = regions
        self.statistics = statistics
        self.limits = limits
        self.bodies = Bodies(host, limits)
        self.preparations = Preparations(self.bodies.empty, max_body)
        self.heap = HeapTrimmer()
        self._loads = Loads()
        self._threads = Threads()

    def allocate(self, nbytes: int) -> memoryview:
        """Writable memory for a request's body; of 64 KiB or more it lies in an arena block, and inputs in it
        are not copied.  It is free again when no view of it is left, and its bytes are in flight until then.

        Raises:
            RequestFailure: 429: too many bytes are in flight.  503: the system has no memory.
        """
        return self.bodies.allocate(nbytes)

    def owe(self, nbytes: int) -> None:
        """Count bytes of answers that wait for their clients.  They are in flight, too, and while that is too
        much, inferences are refused (429)."""
        self.limits.add_bytes(nbytes)

    def paid(self, nbytes: int) -> None:
        """Count them out: they are sent, or their client is gone."""
        self.limits.free_bytes(nbytes)

    def note_size(self, nbytes: int) -> None:
        """Take note of a message that comes or goes whose memory this process has allocated in pieces: after
        large ones, the heap gives its free pages back."""
        self.heap.note(nbytes)

    async def infer(self, request: InferRequest) -> InferResponse:
        """One inference.  Cancelling the coroutine ends the run.  Raises RequestFailure."""
        for _ in range(_ATTEMPTS):
            with (
                self._models.use(request.model, request.version) as model,
                _Course(self, model.entry, request) as inference,
            ):
                try:
                    inference.admit()
                    if long_steps.has_long_inputs(request):
                        prepared = await self._threads.step(inference.prepare)
                    else:
                        prepared = inference.prepare()
                    if not placed_runs.in_use(model.proxy):
                        await self._loads.wait(model.proxy, inference.left())
                    inference.begin()
                    results = await runs.arun(model.proxy, prepared, inference.left(), self._threads)
                    if long_steps.has_long_results(prepared, results):
                        return await self._threads.step(functools.partial(inference.respond, results))
                    return inference.respond(results)
                except ProxyClosedError:
                    inference.withdraw()
                    continue
                except asyncio.CancelledError:
                    inference.fail(cancelled())
                    raise
                except Exception as error:
                    raise inference.failure(error) from error
        raise _was_replaced(request)

    def infer_blocking(self, request: InferRequest, cancel: Deadline) -> InferResponse:
        """The same for a thread.  ``cancel``: a movable deadline; :meth:`Deadline.end` ends the run."""
        for _ in range(_ATTEMPTS):
            with (
                self._models.use(request.model, request.version) as model,
                _Course(self, model.entry, request) as inference,
            ):
                try:
                    inference.admit()
                    prepared = inference.prepare()
                    left = inference.left()
                    deadline = cancel if left is None else Deadline(left, outer=cancel)
                    if not placed_runs.in_use(model.proxy):
                        placed_runs.bind(model.proxy, deadline)
                    inference.begin()
                    results = runs.run(model.proxy, prepared, deadline)
                    return inference.respond(results)
                except ProxyClosedError:
                    inference.withdraw()
                    continue
                except Exception as error:
                    raise inference.failure(error, cancel) from error
        raise _was_replaced(request)

    def refused(self, model: str, version: str, failure: RequestFailure) -> None:
        """Count a request that was refused before it became an inference.  Of others, and those of unknown
        models, nothing is counted here."""
        if failure.is_counted:
            return
        with contextlib.suppress(RequestFailure):
            entry = self._models.find(model, version)
            failure.is_counted = True
            self.statistics.fail(self.statistics.begin(entry.name, entry.version), failure.reason, 0)

    def close(self) -> None:
        """Wait for nothing more; running calls end by themselves."""
        self._loads.close()
        self._threads.close()
        self.heap.close()


class _Course:
    """One request from its arrival to its response.  As a context, it counts the request out at the end,
    whatever was raised."""

    _counts: VersionStatistics | None = None
    _column: int | None = None
    _uses: RegionUses | None = None
    _prepared: Prepared | None = None
    _timeout: float | None = None
    _is_counted = False
    _largest = _nbytes = _ready = _bound = _ran = 0

    def __init__(self, executor: Executor, entry: Served, request: InferRequest) -> None:
        self._began = time.perf_counter_ns()
        self._executor = executor
        self._entry = entry
        self._request = request

    def __enter__(self) -> _Course:
        return self

    def admit(self) -> None:
        """Count the request in.  Raises RequestFailure (413, 429)."""
        executor, request, entry = self._executor, self._request, self._entry
        self._counts = executor.statistics.begin(entry.name, entry.version)
        self._column = executor.limits.enter(entry)
        executor.limits.check_bytes()
        if request.nbytes > FREE_UP_TO:
            self._largest = request.nbytes
            if not executor.bodies.holds(request):
                executor.limits.take_bytes(request.nbytes)
                self._nbytes = request.nbytes

    def prepare(self) -> Prepared:
        """Check the request and return the arguments of its run.  Raises RequestFailure."""
        executor, request, entry = self._executor, self._request, self._entry
        self._timeout = request.timeout
        if request.parameters and (given := checks.check_parameters(request.parameters)) is not None:
            self._timeout = given if request.timeout is None else min(given, request.timeout)
        if request.outputs or any(type(each.data) is RegionSlice for each in request.inputs):
            self._uses = RegionUses(executor.regions)
        prepared = self._prepared = executor.preparations.prepare(entry, request, self._uses)
        self._ready = time.perf_counter_ns()
        return prepared

    def left(self) -> float | None:
        """Seconds that are left to the caller; None: no limit.  Raises RequestFailure if there are none."""
        if self._timeout is None:
            return None
        left = self._timeout - (time.perf_counter_ns() - self._began) / 1e9
        if left <= 0:
            raise self._passed()
        return left

    def begin(self) -> None:
        """Note that the model is loaded, so that the run begins now."""
        self._bound = time.perf_counter_ns()

    def respond(self, results: list[Value]) -> InferResponse:
        """Make the response of a run, and count it."""
        ran = self._ran = time.perf_counter_ns()
        prepared, request, entry = self._prepared, self._request, self._entry
        assert prepared is not None and self._counts is not None
        tensors = [
            outputs.tensor_of(prepared, name, value, request)
            for name, value in zip(prepared.names, results, strict=True)
        ]
        json_outputs.check_outputs(request, tensors)
        for tensor in tensors:
            if tensor.array is not None:
                self._largest = max(self._largest, tensor.array.nbytes)
        response = InferResponse(request.model, entry.version, request.id, tensors)
        now = time.perf_counter_ns()
        durations = Durations(
            self._bound - self._ready, self._ready - self._began, ran - self._bound, now - ran
        )
        self._is_counted = True
        self._executor.statistics.succeed(self._counts, prepared.rows, now - self._began, durations)
        return response

    def failure(self, error: Exception, cancel: Deadline | None = None) -> RequestFailure:
        """Count an error, and return the failure that its caller gets."""
        found = self._failure_of(error, cancel)
        self.fail(found)
        return found

    def _failure_of(self, error: Exception, cancel: Deadline | None) -> RequestFailure:
        if isinstance(error, RunTimeout | DeadlinePassed | LoadTimeout | TimeoutError):
            if self._is_late():
                return self._passed()
            if cancel is not None and cancel.passed:
                return cancelled() if cancel.timeout is None else self._passed()
            # No clock decides: uvloop counts whole milliseconds, so its timeouts may end a moment early.
            if self._timeout is not None and type(error) in _OF_CALLERS:
                return self._passed()
        if not self._ready or self._ran:  # neither a load nor a run
            return own_failure(error, self._entry.name)
        return failure_of(error, self._entry.name, is_loading=not self._bound)

    def _is_late(self) -> bool:
        return self._timeout is not None and time.perf_counter_ns() - self._began >= self._timeout * 1e9

    def _passed(self) -> RequestFailure:
        return passed(f"the request of model '{self._entry.name}' took longer than its timeout")

    def fail(self, failure: RequestFailure) -> None:
        """Count a failure."""
        failure.is_counted = True
        if self._counts is not None and not self._is_counted:
            self._is_counted = True
            self._executor.statistics.fail(self._counts, failure.reason, time.perf_counter_ns() - self._began)

    def withdraw(self) -> None:
        """Count nothing: the request is tried again."""
        if self._counts is not None and not self._is_counted:
            self._is_counted = True
            self._executor.statistics.withdraw(self._counts)

    def __exit__(self, *exc: object) -> None:
        if self._uses is not None:
            self._uses.end()
        self._executor.heap.note(self._largest)
        if self._column is not None:
            self._executor.limits.leave(self._column)
        if self._nbytes:
            self._executor.limits.free_bytes(self._nbytes)
        if not self._is_counted:
            self.fail(cancelled())


def _was_replaced(request: InferRequest) -> RequestFailure:
    return internal(f"model '{request.model}' was replaced again and again before the request could run")
