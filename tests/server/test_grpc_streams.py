"""ModelStreamInfer: order, failures, backpressure, cancelling, the end of the server."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

pytest.importorskip("tritonclient.grpc")

import tritonclient.grpc as triton

from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.server.grpc import answers, stream
from onnx_dl.server.grpc.requests import EMPTY_FINAL
from onnx_dl.server.grpc.service import Arrived
from onnx_dl.server.v2.failures import RequestFailure
from tests.server.grpc_rig import Rig, code_of, listening, raw_request, streamed
from tests.server.standin import TOKEN
from tests.support.waiting import DEADLINE, allowed, eventually

PASSED = "deadline passed"
"""Words of both who may notice that first: the protocol, before the run, and the run."""


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with listening() as rig:
        yield rig


@pytest.fixture(autouse=True)
def all_ends(rig: Rig) -> Iterator[None]:
    """What a test begins has ended when it ends: runs, streams, their places."""
    rig.server.inference.ended = 0
    yield
    eventually(lambda: rig.server.inference.running == 0, "no run")
    eventually(lambda: not rig.listener._streams._open, "no stream")
    eventually(lambda: rig.server.inference.owed == 0, "no answer that waits")


class Sender:
    """Messages of a stream, sent when the test wants them.  Ends with the stream."""

    def __init__(self, *messages: bytes) -> None:
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.taken = 0
        for message in messages:
            self.send(message)

    def send(self, message: bytes) -> None:
        self._messages.put(message)

    def end(self) -> None:
        self._messages.put(None)

    def __iter__(self) -> Iterator[bytes]:
        while (message := self._messages.get()) is not None:
            self.taken += 1
            yield message


def numbered(index: int, **parameters: Any) -> bytes:
    return raw_request(np.float32([index]), id=str(index), **parameters)


def test_tritons_client(rig: Rig) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with triton.InferenceServerClient(rig.address) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for index in range(40):
            tensor = triton.InferInput("x", [1], "FP32")
            tensor.set_data_from_numpy(np.float32([index]))
            client.async_stream_infer(
                "echo", [tensor], request_id=str(index), enable_empty_final_response=index % 2 == 0
            )
        for index in range(40):
            result, error = answers.get(timeout=allowed(DEADLINE))
            assert error is None
            response = result.get_response()
            assert (response.id, result.as_numpy("x")[0]) == (str(index), index)
            assert response.parameters["triton_final_response"].bool_param is True
        client.stop_stream()
    assert sum(EMPTY_FINAL in request.parameters for request in rig.server.inference.requests) == 20


def test_a_failed_request_fails_alone(rig: Rig) -> None:
    messages = [
        numbered(0), numbered(1, fail="it broke"), b"\xff\xff", raw_request(model="another", id=3),
        numbered(4, crash=True), numbered(5),
    ]  # fmt: skip
    got = [streamed(answer) for answer in rig.stream(messages)]
    assert [answer.infer_response.id for answer in got] == ["0", "1", "", "3", "4", "5"]
    errors = [answer.error_message for answer in got]
    assert errors[0] == errors[5] == ""
    assert errors[1] == "it broke"
    assert "not a ModelInferRequest" in errors[2]
    assert "Request for unknown model" in errors[3]
    assert errors[4] == "ModelStreamInfer failed: ZeroDivisionError"


def test_a_client_may_ask_for_the_status_of_a_failure(rig: Rig) -> None:
    call = rig.stream([numbered(0), raw_request(model="another")], metadata=(("triton_grpc_error", "true"),))
    assert streamed(next(call)).infer_response.id == "0"
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    assert code_of(caught.value) == "NOT_FOUND"


def test_requests_run_side_by_side_and_are_answered_in_their_order(rig: Rig) -> None:
    inference, numbers = rig.server.inference, range(stream.MOST_AT_ONCE)
    call = rig.stream([numbered(index, hold="others" if index else "the first") for index in numbers])
    eventually(lambda: inference.running == stream.MOST_AT_ONCE, "all run")
    inference.released.add("others")
    eventually(lambda: inference.running == 1, "the end of all but the first")
    inference.released.add("the first")
    assert [streamed(answer).infer_response.id for answer in call] == [str(index) for index in numbers]


def test_slow_requests_of_some_streams_hold_up_no_other_stream(rig: Rig) -> None:
    slow = [rig.stream([numbered(n, sleep=60.0) for n in range(stream.MOST_AT_ONCE)]) for _ in range(9)]
    wanted = len(slow) * stream.MOST_AT_ONCE
    eventually(lambda: rig.server.inference.running == wanted, "all slow requests run")
    call = rig.stream([numbered(0), numbered(1, timeout=100_000, sleep=60.0)])
    first, second = (streamed(answer).error_message for answer in call)
    assert first == "" and PASSED in second
    for each in slow:
        each.cancel()


def test_the_deadline_of_a_request_counts_from_its_arrival(rig: Rig) -> None:
    earlier = time.monotonic() - 5
    for limited in (
        Arrived(numbered(0, timeout=4_000_000), earlier, None),
        Arrived(numbered(0), earlier, 4.0),
    ):
        with pytest.raises(RequestFailure) as caught:
            rig.listener._service.run(limited, Deadline(None, movable=True), answers.encode)
        assert caught.value.grpc == "DEADLINE_EXCEEDED"
    arrived = Arrived(numbered(0, timeout=60_000_000), earlier, None)
    rig.listener._service.run(arrived, Deadline(None, movable=True), answers.encode)
    timeout = rig.server.inference.requests[-1].timeout
    assert timeout is not None and 0 < timeout <= 55


def test_a_client_that_does_not_read_is_held_up(rig: Rig) -> None:
    answer = np.zeros(250_000, np.float32)
    sender = Sender(*(raw_request(answer, id=index) for index in range(200)))
    call = rig.stream(sender)
    first = next(call)
    counts: list[int] = []

    def is_still() -> bool:
        """Nothing was read for a while, and what was read has its answers, which are counted."""
        counts.append(int(rig.server.inference.requests[-1].id))
        is_answered = rig.server.inference.owed >= (stream.MOST_AT_ONCE - 1) * answer.nbytes
        is_idle = is_answered and not rig.server.inference.running
        return is_idle and len(counts) > 100 and counts[-1] == counts[-100]

    eventually(is_still, "a server that reads no further")
    assert counts[-1] < 100, "it read all that was sent"
    sender.end()
    assert [streamed(data).infer_response.id for data in (first, *call)] == [str(n) for n in range(200)]


def test_cancelling_a_stream_ends_all_its_runs(rig: Rig) -> None:
    sender = Sender(*(numbered(index, sleep=60.0) for index in range(20)))
    call = rig.stream(sender)
    eventually(lambda: rig.server.inference.running == stream.MOST_AT_ONCE, "runs")
    call.cancel()
    eventually(lambda: rig.server.inference.running == 0, "the end of the runs")
    assert rig.server.inference.ended == stream.MOST_AT_ONCE  # none of the others began
    sender.end()


def test_the_deadline_of_the_stream_is_that_of_its_requests(rig: Rig) -> None:
    messages = [raw_request(id="of a stream"), numbered(1, timeout=100_000, sleep=60.0)]
    call = rig.stream(messages, timeout=2 * DEADLINE)
    first, second = map(streamed, call)
    assert first.error_message == "" and PASSED in second.error_message
    (timeout,) = [each.timeout for each in rig.server.inference.requests if each.id == "of a stream"]
    assert timeout is not None and 0 < timeout < 3 * DEADLINE  # on its way, gRPC rounds it up


def test_a_stream_without_requests_and_one_with_a_break(rig: Rig) -> None:
    assert list(rig.stream([])) == []
    sender = Sender(numbered(0))
    call = rig.stream(sender)
    assert streamed(next(call)).infer_response.id == "0"
    sender.send(numbered(1))
    assert streamed(next(call)).infer_response.id == "1"
    sender.end()
    assert list(call) == []


def test_a_client_that_goes_without_a_word_leaves_nothing(rig: Rig) -> None:
    sender = Sender(numbered(0, sleep=60.0))
    channel = grpc.insecure_channel(rig.address, options=[("grpc.use_local_subchannel_pool", 1)])
    call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(iter(sender), timeout=60)
    eventually(lambda: rig.server.inference.running == 1, "a run")
    channel.close()
    eventually(lambda: rig.server.inference.running == 0, "the end of the run")
    sender.end()
    del call


def test_streams_need_the_right(rig: Rig) -> None:
    rig.server.access.needs_token = True
    try:
        with pytest.raises(grpc.RpcError) as caught:
            next(rig.stream([numbered(0)]))
        assert code_of(caught.value) == "PERMISSION_DENIED"
        assert len(list(rig.stream([numbered(0)], metadata=(("authorization", TOKEN),)))) == 1
    finally:
        rig.server.access.needs_token = False


def test_more_streams_than_there_are_places_are_refused(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.listener._streams._places, "_most", 2)
    sender = Sender()
    calls = [rig.stream(sender), rig.stream(Sender(numbered(0)))]
    next(calls[1])
    eventually(lambda: rig.listener._streams._places.taken == 2, "two streams")
    with pytest.raises(grpc.RpcError) as caught:
        next(rig.stream([numbered(0)]))
    assert code_of(caught.value) == "RESOURCE_EXHAUSTED"
    for call in calls:
        call.cancel()
    eventually(lambda: rig.listener._streams._places.taken == 0, "free places")
    sender.end()


def test_draining_answers_what_was_begun_and_ends_the_stream() -> None:
    with listening() as rig:
        sender = Sender(numbered(0, hold="a drain"), numbered(1, hold="a drain"))
        call = rig.stream(sender)
        eventually(lambda: rig.server.inference.running == 2, "runs")
        draining = threading.Thread(target=rig.listener.drain, args=(Deadline(60),))
        draining.start()
        eventually(lambda: rig.listener._streams._is_draining, "the drain")
        rig.server.inference.released.add("a drain")
        assert [streamed(next(call)).infer_response.id for _ in range(2)] == ["0", "1"]
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        assert code_of(caught.value) == "UNAVAILABLE"
        draining.join(allowed(DEADLINE))
        assert not draining.is_alive()
        sender.end()


def test_runs_of_a_stream_are_cut_at_the_end_of_the_drain() -> None:
    with listening() as rig:
        sender = Sender(numbered(0, sleep=60.0))
        call = rig.stream(sender)
        eventually(lambda: rig.server.inference.running == 1, "a run")
        began = time.monotonic()
        rig.listener.drain(Deadline(0.3))
        assert time.monotonic() - began > 0.2
        eventually(lambda: rig.server.inference.running == 0, "the end of the run")
        # The end of the run may be told before the stream is cut.
        with pytest.raises(grpc.RpcError):
            while streamed(next(call)).error_message:
                pass
        sender.end()
