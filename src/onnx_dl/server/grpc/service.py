"""All calls of ``inference.GRPCInferenceService``, as handlers of grpcio.

Each handler takes bytes and gives bytes, and asks for the right before it reads the message: who has no right
gets no thread for long, and no memory.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final, NamedTuple, TypeVar

import grpc
from google.protobuf.message import DecodeError

from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.server.grpc import (
    answers,
    memory_calls,
    refusals,
    repository_calls,
    requests,
    server_calls,
    settings_calls,
)
from onnx_dl.server.grpc.bounds import Arrivals, Places
from onnx_dl.server.grpc.calls import UnaryCall
from onnx_dl.server.grpc.messages import Message
from onnx_dl.server.interfaces import Server
from onnx_dl.server.v2.failures import RequestFailure, cancelled, invalid, passed, unavailable
from onnx_dl.server.v2.messages import InferResponse
from onnx_dl.server.v2.operations import Operation, Scope

T = TypeVar("T")

CALLS: Final[dict[str, UnaryCall]] = {
    **server_calls.CALLS,
    **repository_calls.CALLS,
    **memory_calls.CALLS,
    **settings_calls.CALLS,
}
"""Calls with one message and one answer, without ModelInfer."""

MOST_INFERENCES: Final = 512
"""Inferences that are open, their answers' sending included.  Each has a thread.  Models have queues of their
own, and these are far shorter."""
MOST_OTHERS: Final = 64
MOST_LOOKS: Final = 64
"""Calls that ask for the health and the readiness.  They are apart from those that wait for loads."""
_INFER_ARRIVES: Final = 300.0
"""Seconds in which a request for an inference must arrive: 1 GiB at 30 Mbit/s."""
_OTHER_ARRIVES: Final = 10.0
_LONGEST_WAIT: Final = 3600.0
"""Seconds for an operation on the server's loop; each has an earlier end of its own."""


class Arrived(NamedTuple):
    """A message that has arrived: when, on the monotonic clock, and the seconds that its call had then; None:
    no limit."""

    data: bytes
    at: float
    time_left: float | None


class InferenceService:
    """Answers calls in the threads of a grpcio server."""

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop, arrivals: Arrivals) -> None:
        self._server = server
        self._loop = loop
        self._arrivals = arrivals
        self._has_certificates = bool(server.options.tls_ca)
        self.inference = server.inference
        self.inferences = Places(MOST_INFERENCES, "inferences", server.options.max_body, server.inference)
        self._others = Places(MOST_OTHERS, "calls other than inferences")
        self._looks = Places(MOST_LOOKS, "calls for the health")

    def infer(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """ModelInfer."""
        return self._answered("ModelInfer", context, lambda: self._infer(messages, context))

    def call(self, name: str, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """Any other call with one message and one answer."""
        return self._answered(name, context, lambda: self._call(CALLS[name], messages, context))

    def admit(self, operation: Operation, context: grpc.ServicerContext) -> None:
        """Raises RequestFailure if the caller may not."""
        caller = refusals.caller_of(context, has_certificates=self._has_certificates)
        self._server.access.check(operation, caller)

    def run(self, arrived: Arrived, cancel: Deadline, encode: Callable[[InferResponse], bytes]) -> bytes:
        """One inference, from message to message.  Its deadline counts from the message's arrival.  Raises
        RequestFailure."""
        self.inference.note_size(len(arrived.data))
        named: list[tuple[str, str]] = []

        def find(model: str, version: str) -> None:
            named.append((model, version))
            self._server.models.find(model, version)

        try:
            request = requests.read(arrived.data, arrived.time_left, find)
            if request.timeout is not None:
                request.timeout -= time.monotonic() - arrived.at
                if request.timeout <= 0:
                    raise passed("the request's deadline passed before it could run")
            response = self._server.inference.infer_blocking(request, cancel)
        except RequestFailure as failure:
            for model, version in named:
                self._server.inference.refused(model, version, failure)
            raise
        answer = encode(response)
        self.inference.note_size(len(answer))
        return answer

    @staticmethod
    def _answered(name: str, context: grpc.ServicerContext, answer: Callable[[], bytes]) -> bytes:
        """The answer, or the end of the call with the status of a failure."""
        try:
            return answer()
        except RequestFailure as failure:
            refused = failure
        except grpc.RpcError:  # the client has gone, and grpcio knows
            raise
        except Exception as error:  # our fault ends this call, and no other
            refused = refusals.unexpected(name, error)
        return refusals.refuse(context, refused)

    def _infer(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        self.admit(Operation.INFER, context)
        if self._server.is_draining:
            raise unavailable("the server drains")
        cancel = Deadline(None, movable=True)
        place = self._arrivals.take(self.inferences)

        def over() -> None:
            cancel.end()
            place.give_back()

        if not context.add_callback(over):
            place.give_back()
            raise cancelled()
        data = self._arrivals.first(messages, context, place, _INFER_ARRIVES)
        arrived = Arrived(data, time.monotonic(), refusals.time_left(context))
        answer = self.run(arrived, cancel, answers.encode)
        place.owe(len(answer))
        return answer

    def _call(self, call: UnaryCall, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        self.admit(call.operation, context)
        is_look = call.operation.scope is Scope.HEALTH
        place = self._arrivals.take(self._looks if is_look else self._others)
        if not context.add_callback(place.give_back):
            place.give_back()
            raise cancelled()
        data = self._arrivals.first(messages, context, place, _OTHER_ARRIVES)
        try:
            request = call.request.FromString(data)
        except DecodeError as error:
            raise invalid(f"the message is not a {call.request.DESCRIPTOR.name}: {error}") from error

        def wait(coroutine: Coroutine[Any, Any, T]) -> T:
            return self._wait(coroutine, context)

        answer: Message = call.answer(self._server, request, wait)
        encoded: bytes = answer.SerializeToString()
        return encoded

    def _wait(self, coroutine: Coroutine[Any, Any, T], context: grpc.ServicerContext) -> T:
        """Runs a coroutine on the server's loop.  If the caller goes, it runs to its end without him: a load
        or a registration is whole or not at all."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        woken = threading.Event()
        future.add_done_callback(lambda _: woken.set())
        if not context.add_callback(woken.set):
            raise cancelled()
        left = refusals.time_left(context)
        woken.wait(_LONGEST_WAIT if left is None else min(left, _LONGEST_WAIT))
        if not future.done():
            raise passed("the call's deadline passed") if context.is_active() else cancelled()
        try:
            return future.result(0)
        except concurrent.futures.CancelledError:
            raise unavailable("the server ends") from None
