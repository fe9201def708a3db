"""ModelStreamInfer: requests of one stream run side by side, and are answered in their order.

A stream has two threads, one that reads and one that sends, and runs in threads that all streams share: so
many that no run waits for one, because models have queues of their own, with bounds.  It reads the next
request only while fewer than ``MOST_AT_ONCE`` wait for their answers.  So the flow control of HTTP/2 holds up
a client that sends without reading.
"""

from __future__ import annotations

import concurrent.futures
import queue
import threading
import time
from collections.abc import Iterator
from typing import Final

import grpc

from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.server.grpc import answers, refusals, requests
from onnx_dl.server.grpc.bounds import Place, Places
from onnx_dl.server.grpc.service import Arrived, InferenceService
from onnx_dl.server.v2.failures import RequestFailure, cancelled, unavailable
from onnx_dl.server.v2.operations import Operation

MOST_AT_ONCE: Final = 8
"""Requests of one stream that run, or whose answers wait."""
MOST_STREAMS: Final = 128
_THREADS: Final = MOST_STREAMS * MOST_AT_ONCE
"""A thread starts when all others run."""
_STATUS_HEADER: Final = "triton_grpc_error"
"""Metadata by which a client asks that a failed request ends the stream with its status."""


class _Answer:
    """The outcome of one request: the bytes to send, and the failure that they tell of."""

    __slots__ = ("data", "failure")

    def __init__(self, data: bytes, failure: RequestFailure | None = None) -> None:
        self.data = data
        self.failure = failure


class _Drained:
    """Stands in the order of answers where the server began to drain."""


_Following = concurrent.futures.Future[_Answer] | _Drained | None
"""The next answer; None: there is no further request."""


class Stream:
    """One stream."""

    def __init__(
        self,
        service: InferenceService,
        context: grpc.ServicerContext,
        runs: concurrent.futures.Executor,
        place: Place,
    ) -> None:
        self._service = service
        self._context = context
        self._runs = runs
        self._place = place
        self._cancel = Deadline(None, movable=True)
        self._following: queue.SimpleQueue[_Following] = queue.SimpleQueue()
        self._free = threading.Semaphore(MOST_AT_ONCE)
        self._is_over = False
        metadata = dict(context.invocation_metadata())
        self._ends_at_failure = str(metadata.get(_STATUS_HEADER, "")).lower() == "true"

    def end(self) -> None:
        """The call is over: its runs end, and its threads."""
        self._is_over = True
        self._cancel.end()
        self._following.put(None)
        self._free.release()
        self._place.give_back()

    def drain(self) -> None:
        """Ends the stream when what it has read is answered."""
        self._following.put(_Drained())

    def read(self, messages: Iterator[bytes]) -> None:
        """Starts a run for each message.  Returns when the client has sent its last one."""
        try:
            while not self._is_over:
                self._free.acquire()
                if self._is_over:
                    break
                data = next(messages, None)
                if data is None:
                    break
                arrived = Arrived(data, time.monotonic(), refusals.time_left(self._context))
                self._following.put(self._runs.submit(self._run, arrived))
        except (grpc.RpcError, RuntimeError):  # the client has gone; the server ends
            pass
        finally:
            self._following.put(None)

    def answers(self) -> Iterator[bytes]:
        """Answers in the order of the requests.  Raises RequestFailure to end the stream."""
        while (following := self._following.get()) is not None:
            if isinstance(following, _Drained):
                raise unavailable("the server drains")
            answer = following.result()
            if answer.failure is not None and self._ends_at_failure:
                raise answer.failure
            yield answer.data  # the next step comes when it has been sent
            self._place.paid(len(answer.data))
            self._free.release()

    def _run(self, arrived: Arrived) -> _Answer:
        """An answer in any case."""
        try:
            if self._is_over:
                raise cancelled()
            self._service.admit(Operation.INFER, self._context)  # the token may have been taken away since
            data = self._service.run(arrived, self._cancel, answers.encode_streamed)
            self._place.owe(len(data))
            return _Answer(data)
        except RequestFailure as failure:
            refused = failure
        except Exception as error:  # our fault fails this request, and no other
            refused = refusals.unexpected("ModelStreamInfer", error)
        text = refusals.text_of(refused)
        data = answers.encode_failed(text, requests.id_of(arrived.data))
        self._place.owe(len(data))
        return _Answer(data, refused)


class Streams:
    """All streams, and the threads that they share."""

    def __init__(self, service: InferenceService) -> None:
        self._service = service
        self._lock = threading.Lock()
        self._open: set[Stream] = set()
        self._places = Places(MOST_STREAMS, "streams", inference=service.inference)
        self._is_draining = False
        self._runs = concurrent.futures.ThreadPoolExecutor(_THREADS, "grpc stream run")
        self._readers = concurrent.futures.ThreadPoolExecutor(MOST_STREAMS, "grpc stream reader")

    def answer(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """ModelStreamInfer."""
        try:
            stream = self._begin(context)
            try:
                self._readers.submit(stream.read, messages)
                yield from stream.answers()
                return
            finally:
                self._end(stream)
        except RequestFailure as failure:
            refused = failure
        except grpc.RpcError:
            raise
        except Exception as error:
            refused = refusals.unexpected("ModelStreamInfer", error)
        refusals.refuse(context, refused)

    def _begin(self, context: grpc.ServicerContext) -> Stream:
        self._service.admit(Operation.INFER, context)
        stream = Stream(self._service, context, self._runs, self._places.take())
        with self._lock:
            if self._is_draining:
                stream.end()
                raise unavailable("the server drains")
            self._open.add(stream)
        if not context.add_callback(lambda: self._end(stream)):
            self._end(stream)
            raise cancelled()
        return stream

    def _end(self, stream: Stream) -> None:
        with self._lock:
            self._open.discard(stream)
        stream.end()

    def drain(self) -> None:
        """Each stream answers what it has read, and ends."""
        with self._lock:
            self._is_draining = True
            streams = list(self._open)
        for stream in streams:
            stream.drain()

    def close(self) -> None:
        """Ends all streams."""
        with self._lock:
            self._is_draining = True
            streams = list(self._open)
        for stream in streams:
            self._end(stream)
        self._readers.shutdown(wait=False)
        self._runs.shutdown(wait=False)
