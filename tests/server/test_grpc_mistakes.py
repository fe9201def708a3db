"""gRPC with clients that err, are slow, go away, or mean harm."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.server.grpc import service
from onnx_dl.server.grpc.messages import HEALTH, INFERENCE, message
from onnx_dl.server.grpc.service import CALLS
from onnx_dl.server.options import ServeOptions
from tests.server.grpc_rig import UNLIMITED, Rig, a_request, code_of, listening, raw_request
from tests.server.standin import TOKEN
from tests.support.waiting import DEADLINE, allowed, eventually

METHODS = [*CALLS, "ModelInfer"]


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with listening(ServeOptions(max_body=4 << 20)) as rig:
        yield rig


@pytest.fixture(autouse=True)
def all_ends(rig: Rig) -> Iterator[None]:
    """What a test begins has ended when it ends, and the server answers as before."""
    yield
    eventually(lambda: rig.server.inference.running == 0, "no run")
    eventually(lambda: rig.places.taken == 0 and rig.places.unsent == 0, "free places")
    eventually(lambda: not rig.listener._service._arrivals._awaited, "no message that is awaited")
    assert rig.unary("ModelInfer", raw_request())


def failure(rig: Rig, name: str, data: bytes, **keywords: Any) -> tuple[str, str]:
    """Code and text of a call that fails."""
    with pytest.raises(grpc.RpcError) as caught:
        rig.unary(name, data, **keywords)
    return code_of(caught.value), str(caught.value.details())


@pytest.mark.parametrize(
    "path", ["/inference.GRPCInferenceService/Generate", "/another.Service/Call", "/", "/x"]
)
def test_unknown_methods_are_unimplemented(rig: Rig, path: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        rig.channel.unary_unary(path)(b"", timeout=allowed(DEADLINE))
    assert code_of(caught.value) == "UNIMPLEMENTED"


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("data", [b"\xff", b"\x0a\x7f", b"\x0b" * 5000, b"\x0c"])
def test_wrong_bytes_are_an_invalid_argument(rig: Rig, name: str, data: bytes) -> None:
    code, text = failure(rig, name, data)
    assert code == "INVALID_ARGUMENT"
    assert f"the message is not a {name}Request" in text


@pytest.mark.parametrize("name", METHODS)
def test_a_call_without_a_message_is_an_invalid_argument(rig: Rig, name: str) -> None:
    future = rig.sending(name, [])
    assert code_of(future.exception()) == "INVALID_ARGUMENT"
    assert future.details() == "the call has no message"


@pytest.mark.parametrize(
    "shape", [(1 << 20, 1 << 20), (1 << 33, 1 << 33), (-1,), (1 << 62, 1 << 62, 0, 1), (2, 3), ()]
)
def test_shapes_that_lie_allocate_nothing(rig: Rig, shape: tuple[int, ...]) -> None:
    request = a_request()
    del request.inputs[0].shape[:]
    request.inputs[0].shape.extend(shape)
    code, text = failure(rig, "ModelInfer", request.SerializeToString())
    assert code == "INVALID_ARGUMENT"
    assert "its shape" in text


def test_a_message_over_the_limit_is_refused(rig: Rig) -> None:
    assert rig.unary("ModelInfer", raw_request(np.zeros(1_000_000, np.float32)))
    code, text = failure(rig, "ModelInfer", raw_request(np.zeros((4 << 20) // 4, np.float32)))
    assert code == "RESOURCE_EXHAUSTED"
    assert "larger than max" in text


@pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_what_a_compressed_message_becomes_is_limited(rig: Rig, algorithm: grpc.Compression) -> None:
    bomb = raw_request(np.zeros(32 << 20, np.float32))
    code, text = failure(rig, "ModelInfer", bomb, compression=algorithm)
    assert code == "RESOURCE_EXHAUSTED"
    assert text == "Decompressed message larger than max"  # older grpcio says how large it became


def test_a_head_over_the_limit_is_refused(rig: Rig) -> None:
    code, _ = failure(rig, "ModelInfer", raw_request(), metadata=(("authorization", "x" * 200_000),))
    assert code == "RESOURCE_EXHAUSTED"


def test_who_has_no_right_is_refused_before_the_message_is_read(rig: Rig) -> None:
    never = threading.Event()

    def held_back() -> Iterator[bytes]:
        never.wait(allowed(DEADLINE))
        yield from ()

    rig.server.access.needs_token = True
    try:
        for name in METHODS:
            if name in ("ServerLive", "ServerReady", "ModelReady"):
                continue
            future = rig.sending(name, held_back())
            assert code_of(future.exception(allowed(DEADLINE))) == "PERMISSION_DENIED"
        assert rig.unary("ModelInfer", raw_request(), metadata=(("authorization", TOKEN),))
    finally:
        rig.server.access.needs_token = False
        never.set()


def test_a_message_that_does_not_arrive_ends_its_call(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_INFER_ARRIVES", 0.2)
    never = threading.Event()

    def held_back() -> Iterator[bytes]:
        never.wait(allowed(2 * DEADLINE))
        yield from ()

    future = rig.sending("ModelInfer", held_back(), timeout=allowed(2 * DEADLINE))
    assert code_of(future.exception(allowed(DEADLINE))) == "CANCELLED"
    never.set()


def test_slow_messages_keep_nobody_waiting(rig: Rig) -> None:
    never = threading.Event()

    def held_back() -> Iterator[bytes]:
        never.wait(allowed(2 * DEADLINE))
        yield from ()

    slow = [rig.sending("ModelInfer", held_back(), timeout=allowed(2 * DEADLINE)) for _ in range(100)]
    eventually(lambda: rig.places.taken == 100, "calls whose messages are awaited")
    assert rig.unary("ModelInfer", raw_request())
    assert rig.places.taken >= 100, "they still wait"
    for future in slow:
        future.cancel()
    never.set()


def test_the_deadline_of_the_call_ends_its_run(rig: Rig) -> None:
    rig.unary("ModelInfer", raw_request(), timeout=2 * DEADLINE)
    timeout = rig.server.inference.requests[-1].timeout
    assert timeout is not None and 0 < timeout < 3 * DEADLINE  # on its way, gRPC rounds it up
    code, _ = failure(rig, "ModelInfer", raw_request(sleep=60.0), timeout=0.2)
    assert code == "DEADLINE_EXCEEDED"
    eventually(lambda: rig.server.inference.running == 0, "the end of the run")


def test_the_timeout_of_the_request_ends_its_run(rig: Rig) -> None:
    code, text = failure(rig, "ModelInfer", raw_request(sleep=60.0, timeout=100_000))
    # The protocol says it in other words if the time was over before the run.
    assert code == "DEADLINE_EXCEEDED" and "deadline passed" in text


def test_cancelling_a_call_ends_its_run_soon(rig: Rig) -> None:
    call = rig.channel.unary_unary(f"/{INFERENCE}/ModelInfer").future(raw_request(sleep=60.0), timeout=60)
    eventually(lambda: rig.server.inference.running == 1, "a run")
    call.cancel()
    eventually(lambda: rig.server.inference.running == 0, "the end of the run")


def test_a_connection_that_is_cut_ends_its_runs(rig: Rig) -> None:
    channel = grpc.insecure_channel(rig.address, options=[("grpc.use_local_subchannel_pool", 1)])
    call = channel.unary_unary(f"/{INFERENCE}/ModelInfer").future(raw_request(sleep=60.0), timeout=60)
    eventually(lambda: rig.server.inference.running == 1, "a run")
    channel.close()
    eventually(lambda: rig.server.inference.running == 0, "the end of the run")
    del call


@pytest.mark.parametrize(
    "data",
    [b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"\x00" * 5000,
     b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 5000],
)  # fmt: skip
def test_other_protocols_are_hung_up(rig: Rig, data: bytes) -> None:
    host, _, port = rig.address.partition(":")
    with socket.create_connection((host, int(port)), timeout=allowed(DEADLINE)) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        try:
            while connection.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass


def test_more_inferences_than_there_are_places_are_refused(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.places, "_most", 2)
    infer = rig.channel.unary_unary(f"/{INFERENCE}/ModelInfer")
    running = [infer.future(raw_request(sleep=60.0), timeout=60) for _ in range(2)]
    eventually(lambda: rig.server.inference.running == 2, "runs")
    code, text = failure(rig, "ModelInfer", raw_request())
    assert (code, text) == ("RESOURCE_EXHAUSTED", "2 inferences are open, the most at one time")
    assert rig.unary("ServerLive", b"")  # others are not held up
    for call in running:
        call.cancel()
    eventually(lambda: rig.places.taken == 0, "free places")


def test_answers_that_nobody_reads_are_bounded() -> None:
    """A client that takes no bytes of its answers: they wait in our memory, and no further request comes."""
    with listening(ServeOptions(max_body=8 << 20)) as rig:
        channel = grpc.insecure_channel(
            rig.address,
            options=[*UNLIMITED, ("grpc.http2.lookahead_bytes", 1 << 10), ("grpc.http2.bdp_probe", 0),
                     ("grpc.use_local_subchannel_pool", 1)],
        )  # fmt: skip
        # As a stream of answers, so that the client takes none before it is asked.
        infer = channel.unary_stream(f"/{INFERENCE}/ModelInfer")
        data = raw_request(np.zeros(1 << 20, np.float32))
        calls = [infer(data, timeout=60) for _ in range(4)]
        eventually(lambda: rig.places.unsent > 8 << 20, "answers that wait")
        assert rig.server.inference.owed == rig.places.unsent
        code, text = failure(rig, "ModelInfer", raw_request())
        assert code == "RESOURCE_EXHAUSTED"
        assert "wait for clients to read them" in text
        for call in calls:
            call.cancel()
        eventually(lambda: rig.places.unsent == 0, "no answer that waits")
        assert rig.server.inference.owed == 0
        assert rig.unary("ModelInfer", raw_request())
        channel.close()


@pytest.mark.parametrize(
    ("method", "places", "data"),
    [("inference.GRPCInferenceService/ServerLive", 64, b""), ("grpc.health.v1.Health/Check", 64, b""),
     (f"{INFERENCE}/ModelInfer", 512, raw_request())],
)  # fmt: skip
def test_calls_without_a_message_keep_no_others_out(
    rig: Rig, method: str, places: int, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever opens all the calls that may be open, and sends nothing.  Health needs no right to do that."""
    for name in ("service._OTHER_ARRIVES", "service._INFER_ARRIVES", "health._ARRIVES"):
        monkeypatch.setattr(f"onnx_dl.server.grpc.{name}", 3600.0)
    over = threading.Event()

    def nothing() -> Iterator[bytes]:
        over.wait(allowed(DEADLINE))
        yield from ()

    channels = [
        grpc.insecure_channel(rig.address, [*UNLIMITED, ("grpc.use_local_subchannel_pool", 1)])
        for _ in range(places // 128 + 1)
    ]
    try:
        calls = [
            channels[number % len(channels)].stream_unary(f"/{method}").future(nothing())
            for number in range(places + 20)
        ]

        def is_answered() -> bool:
            try:
                rig.channel.unary_unary(f"/{method}")(data, timeout=allowed(DEADLINE))
            except grpc.RpcError as error:
                assert code_of(error) == "RESOURCE_EXHAUSTED"
                return False
            return True

        eventually(lambda: sum(call.done() for call in calls) >= 20, "a refusal of those that are too many")
        eventually(is_answered, "an answer to a call with a message")
    finally:
        over.set()
        for channel in channels:
            channel.close()


def test_the_health_is_told_while_all_places_wait_for_loads(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = rig.listener._service._others
    monkeypatch.setattr(others, "_most", 2)
    rig.server.control.can_load.clear()
    data = message("inference.RepositoryModelLoadRequest")(model_name="echo").SerializeToString()
    try:
        loads = [rig.sending("RepositoryModelLoad", [data]) for _ in range(2)]
        eventually(lambda: rig.server.control.loading == 2, "loads that wait")
        assert others.taken == 2
        assert failure(rig, "ServerMetadata", b"")[0] == "RESOURCE_EXHAUSTED"
        ready = message("inference.ModelReadyRequest")(name="echo").SerializeToString()
        for name, request in (("ServerLive", b""), ("ServerReady", b""), ("ModelReady", ready)):
            assert rig.unary(name, request)
    finally:
        rig.server.control.can_load.set()
    for load in loads:
        load.result(allowed(DEADLINE))


def test_operations_on_the_loop_do_not_hold_a_caller_that_has_gone(rig: Rig) -> None:
    rig.server.control.can_load.clear()
    data = message("inference.RepositoryModelLoadRequest")(model_name="echo").SerializeToString()
    try:
        load = rig.sending("RepositoryModelLoad", [data], timeout=1.0)
        eventually(lambda: rig.server.control.loading == 1, "a load that waits")
        assert code_of(load.exception(allowed(DEADLINE))) == "DEADLINE_EXCEEDED"
        others = rig.listener._service._others
        eventually(lambda: others.taken == 0, "a free place")
        asked = len(rig.server.control.asked)
    finally:
        rig.server.control.can_load.set()
    eventually(lambda: len(rig.server.control.asked) == asked + 1, "the end of the load")


def test_a_server_that_drains_says_so(rig: Rig) -> None:
    rig.server.is_draining = True
    try:
        code, text = failure(rig, "ModelInfer", raw_request())
        assert (code, text) == ("UNAVAILABLE", "the server drains")
        ready = message("inference.ServerReadyResponse").FromString(rig.unary("ServerReady", b""))
        assert not ready.ready
    finally:
        rig.server.is_draining = False


def test_draining_finishes_what_was_begun_and_tells_watchers() -> None:
    with listening() as rig:
        infer = rig.channel.unary_unary(f"/{INFERENCE}/ModelInfer")
        running = infer.future(raw_request(hold="a drain"), timeout=60)
        watching = rig.channel.unary_stream(f"/{HEALTH}/Watch")(b"", timeout=60)
        serving, not_serving = (
            message("grpc.health.v1.HealthCheckResponse")(status=name).SerializeToString()
            for name in ("SERVING", "NOT_SERVING")
        )
        assert next(watching) == serving
        eventually(lambda: rig.server.inference.running == 1, "a run")
        draining = threading.Thread(target=rig.listener.drain, args=(Deadline(60),))
        draining.start()
        assert next(watching) == not_serving
        with pytest.raises(grpc.RpcError) as caught:
            next(watching)
        assert code_of(caught.value) == "UNAVAILABLE"
        rig.server.inference.released.add("a drain")
        assert running.result(allowed(DEADLINE))
        draining.join(allowed(DEADLINE))
        assert not draining.is_alive()
        with pytest.raises(grpc.RpcError) as caught:
            infer(raw_request(), timeout=5)
        assert code_of(caught.value) == "UNAVAILABLE"


def test_the_end_of_the_drain_cuts_runs() -> None:
    with listening() as rig:
        infer = rig.channel.unary_unary(f"/{INFERENCE}/ModelInfer")
        running = infer.future(raw_request(sleep=60.0), timeout=60)
        eventually(lambda: rig.server.inference.running == 1, "a run")
        began = time.monotonic()
        rig.listener.drain(Deadline(0.3))
        assert time.monotonic() - began > 0.2
        assert code_of(running.exception(allowed(DEADLINE))) in ("CANCELLED", "UNAVAILABLE")
        eventually(lambda: rig.server.inference.running == 0, "the end of the run")


def test_inferences_that_are_refused_are_told_to_those_who_count(rig: Rig) -> None:
    rig.server.inference.refusals.clear()
    wrong = a_request()
    wrong.inputs[0].datatype = "FP32"
    wrong.inputs[0].contents.int_contents.append(1)
    for data in (wrong.SerializeToString(), b"\xff", a_request(model="unknown").SerializeToString()):
        failure(rig, "ModelInfer", data)
    refusals = rig.server.inference.refusals
    assert refusals[0] == ("echo", "", 400, "OTHER")
    assert [(model, http) for model, _, http, _ in refusals[1:]] == [("unknown", 404)]
