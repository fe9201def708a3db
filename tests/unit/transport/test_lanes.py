"""Both ends of a lane in this process, with the smallest buffers that the kernel allows.

Every kind of message at every size, and what a hostile caller can do to a worker.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.errors import ProtocolError
from onnx_dl.protocol import codec, control, failures
from onnx_dl.protocol.lane import (
    Call,
    CallFailed,
    Draining,
    Envelope,
    Forgotten,
    Hold,
    Invoke,
    LaneHello,
    LaneOpen,
    Packed,
    Plain,
    Replay,
    Result,
    SameResult,
    Started,
    Tensor,
    Terminate,
    Text,
    Touch,
    Unhold,
    lane_reply,
)
from onnx_dl.system.owned_descriptors import Descriptor
from onnx_dl.tensors import arena, segment
from onnx_dl.tensors.call_plans import CallPlan
from onnx_dl.transport import sockets, zeromq
from onnx_dl.transport.client_lane import ClientLane
from onnx_dl.transport.gauges import Gauges
from onnx_dl.transport.sockets import Channel, Listener, fresh_address
from onnx_dl.transport.worker_lane import WorkerLane
from onnx_dl.workers.engine_trims import EngineTrims
from onnx_dl.workers.engines.base import CancelToken, Rerun
from onnx_dl.workers.gate import Gate
from onnx_dl.workers.lane_service import LaneService, Upkeep
from onnx_dl.workers.pinned_blocks import PinnedBlocks
from tests.support.builders import DESCRIPTION
from tests.support.waiting import DEADLINE, allowed

SECRET = "s" * 32
SIZES = [1, 4000, 5000, 300_000, pytest.param(50 << 20, marks=pytest.mark.slow)]
BOUND = 30.0
"""Seconds that any message may take.  Most of it is copying; before, these never came back."""


class Echo:
    """An engine that gives what it is fed, counts, and fails on request."""

    def __init__(self) -> None:
        self.runs = self.reruns = 0
        self.lane: WorkerLane | None = None
        """Of the last caller."""

    def run(self, outputs: Any, feed: dict[str, Any], options: Any, token: CancelToken) -> list[Any]:
        self.runs += 1
        if "error" in feed:
            raise ValueError("e" * int(feed["error"][0]))
        if "twice" in feed and self.lane is not None:
            self.lane.reply(list(feed.values()))
        return list(feed.values()) + ([options] if options else []) + ([outputs] if outputs else [])

    def run_async(self, outputs: Any, feed: Any, options: Any, token: CancelToken, started: Any) -> list[Any]:
        started()
        return self.run(outputs, feed, options, token)

    def bind(self, *_: Any) -> None:
        return None

    def rerun(self, outputs: Any) -> Rerun:
        def run(feed: dict[str, Any]) -> list[Any]:
            self.reruns += 1
            return list(feed.values())

        return Rerun(run, lambda: None)

    def invoke(self, method: str, args: list[Any], token: CancelToken) -> Any:
        return args


class Worker:
    """Serves lanes in threads of this process."""

    def __init__(self) -> None:
        self.backend = Echo()
        self.gate = Gate(-1.0, 0.0, lambda: None, Gauges())
        self.address = fresh_address("worker")
        self.listener = Listener(self.address)
        self.context = zeromq.context()
        self.threads: list[threading.Thread] = []
        self.tokens: dict[int, CancelToken] = {}

    def granted(self) -> control.Granted:
        return control.Granted(
            ticket=1, worker_id=1, pid=1, address=self.address, secret=SECRET, description=DESCRIPTION
        )

    def accept(self) -> None:
        """The next caller has a thread."""
        poll = zeromq.zmq.Poller()
        poll.register(self.listener.fileno(), zeromq.zmq.POLLIN)

        def serve() -> None:
            assert zeromq.wait(poll, DEADLINE)
            channel = self.listener.accept()
            assert channel is not None
            with contextlib.suppress(ProtocolError, TimeoutError), contextlib.closing(channel):
                lane = WorkerLane(self.context, channel, SECRET, DEADLINE)
                backend: Any = self.backend
                backend.lane = lane
                upkeep = Upkeep(None, None, EngineTrims(self.gate.in_flight, lambda: None), PinnedBlocks())
                service = LaneService(lane, self.gate, backend, self.tokens, upkeep)
                done = sockets.Waker()
                watcher = threading.Thread(target=_watch, args=(channel, lane, done))
                watcher.start()
                service.run()
                done.wake()
                watcher.join()
                lane.close_calls()

        self.threads.append(threading.Thread(target=serve))
        self.threads[-1].start()

    def close(self) -> None:
        for thread in self.threads:
            thread.join(allowed(DEADLINE))
            assert not thread.is_alive()
        self.listener.close()
        self.context.term()


def _watch(channel: Channel, lane: WorkerLane, done: sockets.Waker) -> None:
    """Ends the lane's wait when the caller is gone, as the worker's main thread does."""
    poll = zeromq.zmq.Poller()
    poll.register(channel.fileno(), zeromq.zmq.POLLERR)
    poll.register(done.fileno(), zeromq.zmq.POLLIN)
    if done.fileno() not in zeromq.wait(poll, None):
        lane.hang_up()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trim may take longer where others use the processors; a caller would do without it."""
    monkeypatch.setattr("onnx_dl.transport.client_lane._TRIM_TIMEOUT", DEADLINE)


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    init = Channel.__init__

    def with_small_buffers(self: Channel, sock: socket.socket, *owner: Descriptor) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
        init(self, sock, *owner)

    monkeypatch.setattr(Channel, "__init__", with_small_buffers)


@pytest.fixture
def worker(small_buffers: None) -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


@pytest.fixture(params=["bell", "zmq"])
def lane(request: pytest.FixtureRequest, worker: Worker) -> Iterator[ClientLane]:
    worker.accept()
    context = zeromq.context()
    made = ClientLane(
        context if request.param == "zmq" else None, worker.granted(), Deadline(DEADLINE), latency="normal"
    )
    yield made
    made.close()
    context.term()


def ask(lane: ClientLane, request: Any) -> Any:
    lane.send(request)
    return lane.receive(BOUND)


def called(lane: ClientLane, feed: dict[str, Any], outputs: Any = None, options: Any = None) -> Any:
    """What the worker gives back."""
    request = lane.codec.encode_call(outputs, feed, options)
    reply = ask(lane, request)
    if isinstance(reply, CallFailed):
        raise failures.rebuild(reply.failure)
    return lane.codec.decode(request, reply)


def same(got: Any, sent: Any) -> bool:
    if isinstance(sent, np.ndarray):
        assert isinstance(got, np.ndarray)
        alike = got.dtype == sent.dtype and got.shape == sent.shape
        return alike and (
            got.tolist() == sent.tolist() if sent.dtype == object else np.array_equal(got, sent)
        )
    if isinstance(sent, list | tuple):
        return type(got) is type(sent) and len(got) == len(sent) and all(map(same, got, sent))
    if isinstance(sent, dict):
        return list(got) == list(sent) and all(map(same, got.values(), sent.values()))
    return type(got) is type(sent) and got == sent


VALUES = {
    "one text": lambda n: np.array(["x" * n], object),
    "many texts": lambda n: np.array(["x"] * max(1, n // 50), object),
    "texts of two dimensions": lambda n: np.array([["x" * (n // 2)], ["y" * (n // 2)]], object),
    "fixed text": lambda n: np.array(["x" * max(1, n // 4)]),
    "numbers": lambda n: np.arange(n, dtype=np.uint8),
    "maps": lambda n: [{"a": i / 3, "b": -0.0} for i in range(max(1, n // 500))],
    "maps of text": lambda n: [{1: "x" * n}, {1: ""}],
    "a list of arrays": lambda n: [np.arange(n % 100_000), np.ones(3, np.float32)],
    "many small arrays": lambda n: [np.full(3, i) for i in range(min(5000, max(1, n // 100)))],
    "many large arrays": lambda n: [np.full(70_000, i, np.uint8) for i in range(min(200, max(1, n // 5000)))],
    "a tuple": lambda n: ("x" * n, 1),
    "bytes": lambda n: b"x" * n,
    "text": lambda n: "x" * n,
    "a list of numbers": lambda n: list(range(max(1, n // 100))),
    "a long key": lambda n: {"k" * n: np.ones(2)},
}


@pytest.mark.timeout(100)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", VALUES)
def test_values_of_every_kind_and_size_both_ways(lane: ClientLane, kind: str, size: int):
    value = VALUES[kind](size)
    for _ in range(4):
        (got,) = called(lane, {"x": value})
        assert same(got, value)


@pytest.mark.timeout(100)
@pytest.mark.parametrize("size", SIZES)
def test_names_options_methods_and_errors_of_every_size(lane: ClientLane, worker: Worker, size: int):
    one = np.ones(1)
    assert called(lane, {"x": one}, options={"o": "x" * size}) == [1, {"o": "x" * size}]
    assert called(lane, {"x": one}, outputs=["n" * size]) == [1, ["n" * size]]
    assert called(lane, {"x" * size: one}) == [1]
    values = [np.ones(size, np.uint8), "x" * size]
    request = Invoke(method="m" * size, args=lane.codec.pack(values))
    assert same(lane.codec.decode(request, ask(lane, request)), values)
    with pytest.raises(ValueError) as error:
        called(lane, {"error": np.array([size])})
    assert len(str(error.value)) == size
    call = lane.codec.encode_call(None, {"x": np.array(["x" * size], object)}, None, background=True)
    assert isinstance(ask(lane, call), Started)
    assert same(lane.codec.decode(call, lane.receive(BOUND)), [np.array(["x" * size], object)])


@pytest.mark.timeout(100)
@pytest.mark.parametrize("size", SIZES)
def test_a_long_name_of_the_model(worker: Worker, size: int):
    """The first message of a lane."""
    worker.accept()
    granted = msgspec.structs.replace(worker.granted(), model="k" * size)
    lane = ClientLane(None, granted, Deadline(DEADLINE), latency="normal")
    assert same(called(lane, {"x": np.ones(2)}), [np.ones(2)])
    lane.close()


def test_the_other_messages(lane: ClientLane):
    for request in (Touch(), Hold(), Unhold(), Terminate(thread=1, request=1)):
        assert isinstance(ask(lane, request), Result)
    assert same(called(lane, {"x": np.array(["x" * 300_000], object)})[0][0], "x" * 300_000)
    assert lane.trim()
    assert same(called(lane, {"x": np.ones(3)}), [np.ones(3)])


def test_a_trim_of_many_blocks(lane: ClientLane):
    value = [np.full(70_000, i, np.uint8) for i in range(50)]
    kept = [called(lane, {"x": value}) for _ in range(20)]
    assert all(same(got, [value]) for got in kept)
    kept.clear()
    assert lane.trim()
    assert not lane.is_large


@pytest.mark.parametrize("calls", [1, 127, 128, 300])
def test_an_answer_to_another_request_is_none(lane: ClientLane, calls: int):
    """Numbers begin anew at 128."""
    sent = np.arange(4.0)
    for _ in range(calls):
        assert same(called(lane, {"x": sent}), [sent])
    assert same(called(lane, {"twice": sent}), [sent])
    with pytest.raises(ProtocolError, match="answered request"):
        called(lane, {"x": sent})


# --- calls that repeat -------------------------------------------------------------------------------------


def test_text_and_maps_repeat_without_a_message(lane: ClientLane, worker: Worker):
    for turn in range(20):
        text = np.array([f"turn {turn}", "ü" * turn], object)
        (got,) = called(lane, {"x": text})
        assert same(got, text)
    assert (worker.backend.runs, worker.backend.reruns) == (2, 18)
    request = lane.codec.encode_call(None, {"x": text}, None)
    assert isinstance(request, CallPlan)
    reply = ask(lane, request)
    assert isinstance(reply, int | SameResult)
    assert same(lane.codec.decode(request, reply), [text])


@pytest.mark.parametrize("seed", range(3))
def test_forms_that_change(lane: ClientLane, seed: int):
    """Lengths, shapes, types and sizes by turns, numbers among them."""
    rng = np.random.default_rng(seed)

    def some() -> np.ndarray:
        if rng.integers(2):
            return rng.random(rng.integers(4))
        lengths = rng.integers(1, 10, rng.integers(4)) ** rng.integers(6)
        return np.array(["xä"[rng.integers(2)] * int(length) for length in lengths], object)

    for _ in range(150):
        feed = {name: some() for name in "ab"[: rng.integers(1, 3)]}
        assert same(called(lane, feed), list(feed.values()))


def test_surrogates_are_refused_where_they_are(lane: ClientLane):
    for _ in range(4):
        assert same(called(lane, {"x": np.array(["fine"], object)})[0][0], "fine")
        with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
            lane.codec.encode_call(None, {"x": np.array(["\udc80"], object)}, None)


# --- callers that are not ours -----------------------------------------------------------------------------


class Stranger:
    """A caller who knows the secret and says what it likes."""

    def __init__(self, worker: Worker) -> None:
        worker.accept()
        self.channel = Channel.connect(worker.address, Deadline(DEADLINE))
        self.eventfd = os.eventfd(0)
        self.pipe, workers_end = os.pipe()
        memfd = segment.create(64)
        hello = LaneHello(version=codec.PROTOCOL_VERSION, secret=SECRET)
        envelope = Envelope(shared=[(1, 0)], message=msgspec.Raw(codec.encode(hello)))
        self.channel.post(codec.encode(envelope), (memfd, self.eventfd, workers_end))
        os.close(memfd)
        os.close(workers_end)
        assert isinstance(self.hear(), LaneOpen)

    def say(self, data: bytes, fds: tuple[int, ...] = (), number: int = 1) -> None:
        self.channel.post(data, fds)
        os.eventfd_write(self.eventfd, number)

    def hear(self) -> Any:
        """The next reply; None at the end of the lane."""
        if not os.read(self.pipe, 1):
            return None
        received = self.channel.receive(allowed(DEADLINE))
        message = None if received is None else lane_reply(received[0])
        if isinstance(message, Envelope):
            sockets.close_all(received[1] if received else [])
            message = lane_reply(message.message)
        return message

    def close(self) -> None:
        self.channel.close()
        os.close(self.eventfd)
        os.close(self.pipe)


@pytest.mark.parametrize("odd", ["/dev/zero", "/dev/null", "pipe", "swapped", "read end"])
def test_a_bell_of_other_descriptors_opens_no_lane(worker: Worker, odd: str):
    worker.accept()
    with contextlib.ExitStack() as stack:
        eventfd, (read_end, write_end), page = os.eventfd(0), os.pipe(), segment.create(64)
        fds = [eventfd, read_end, write_end, page]
        if odd.startswith("/"):
            fds.append(os.open(odd, os.O_RDWR))
        for fd in fds:
            stack.callback(os.close, fd)
        bell = {
            "pipe": (read_end, write_end),
            "swapped": (write_end, eventfd),
            "read end": (eventfd, read_end),
        }.get(odd, (fds[-1], write_end))
        channel = Channel.connect(worker.address, Deadline(DEADLINE))
        stack.callback(channel.close)
        hello = LaneHello(version=codec.PROTOCOL_VERSION, secret=SECRET)
        channel.post(
            codec.encode(Envelope(shared=[(1, 0)], message=msgspec.Raw(codec.encode(hello)))), (page, *bell)
        )
        assert channel.receive(allowed(DEADLINE)) is None


@pytest.fixture
def stranger(worker: Worker) -> Iterator[Stranger]:
    made = Stranger(worker)
    yield made
    made.close()


TENSOR = Tensor("<f4", (10**9,), 1, 0)
NONSENSE = [
    b"",
    b"\xc1",
    codec.encode(Draining()),
    codec.encode(Envelope()),
    codec.encode(Envelope(letter=(1, 1 << 40))),
    codec.encode(Call(outputs=Plain(None), feed=[("x", TENSOR)])),
    codec.encode(Call(outputs=Plain(None), feed=[("x", Text((1,), 1, 0))], plan=0)),
    codec.encode(Call(outputs=Plain(None), feed=[("x", Packed(1, 1 << 40))])),
]
UNKNOWN = [codec.encode(Replay(plan=77)), codec.encode(Replay(plan=0, moved=[(99, TENSOR)]))]


@pytest.mark.parametrize("index", range(len(NONSENSE)))
def test_nonsense_is_answered_and_the_lane_goes_on(stranger: Stranger, index: int):
    stranger.say(NONSENSE[index])
    heard = stranger.hear()
    if index:
        assert isinstance(heard, CallFailed)
        stranger.say(codec.encode(Touch()))
        assert isinstance(stranger.hear(), Result)
    else:
        assert heard is None, "an empty packet is EOF"


@pytest.mark.parametrize("again", UNKNOWN)
def test_a_call_that_was_never_made_is_not_made_again(stranger: Stranger, again: bytes):
    stranger.say(again)
    assert isinstance(stranger.hear(), Forgotten)
    os.eventfd_write(stranger.eventfd, 2 + 5)
    assert isinstance(stranger.hear(), Forgotten)
    stranger.say(codec.encode(Touch()))
    assert isinstance(stranger.hear(), Result)


def test_a_number_that_no_caller_gives_is_not_remembered(stranger: Stranger):
    for number in (64, 1 << 40, -1):
        stranger.say(codec.encode(Call(outputs=Plain(None), feed=[], plan=number)))
        assert isinstance(stranger.hear(), Result)
        stranger.say(codec.encode(Replay(plan=number)))
        assert isinstance(stranger.hear(), Forgotten)


def test_a_call_is_remembered_when_its_result_is_sent_and_the_first_replaces_all(stranger: Stranger):
    bad = codec.encode(Call(outputs=Plain(None), feed=[("error", Plain([1]))], plan=1))
    for number, kept in ((0, [0]), (1, [0, 1]), (2, [0, 1, 2]), (0, [0])):
        stranger.say(codec.encode(Call(outputs=Plain([f"{number}"]), feed=[], plan=number)))
        assert isinstance(stranger.hear(), Result)
        for again in range(4):
            stranger.say(codec.encode(Replay(plan=again)))
            assert isinstance(stranger.hear(), Result if again in kept else Forgotten)
    stranger.say(bad)
    assert isinstance(stranger.hear(), CallFailed)
    stranger.say(codec.encode(Replay(plan=1)))
    assert isinstance(stranger.hear(), Forgotten), "a call that failed has changed nothing"


def test_one_block_too_many_ends_the_lane(stranger: Stranger):
    memfd = segment.create(100)
    number = 1
    for _ in range(arena.MOST_MAPPED // 50 + 1):
        shared = [(number := number + 1, 10) for _ in range(50)]
        stranger.say(
            codec.encode(Envelope(shared=shared, message=msgspec.Raw(codec.encode(Touch())))), (memfd,) * 50
        )
        heard = stranger.hear()
    os.close(memfd)
    assert isinstance(heard, CallFailed)
    stranger.say(codec.encode(Touch()))
    assert stranger.hear() is None


def test_a_bell_without_a_packet_ends_the_lane(stranger: Stranger):
    os.eventfd_write(stranger.eventfd, 1)
    assert stranger.hear() is None


def test_lost_blocks_end_the_lane_when_that_was_told(stranger: Stranger):
    lost = Envelope(shared=[(2, 1 << 30)], message=msgspec.Raw(codec.encode(Touch())))
    with open("/dev/null") as null:
        stranger.say(codec.encode(lost), (null.fileno(),))
    assert isinstance(stranger.hear(), CallFailed)
    stranger.say(codec.encode(Touch()))
    assert stranger.hear() is None


def test_who_reads_no_replies_stops_nobody(stranger: Stranger, worker: Worker):
    for _ in range(50):
        stranger.say(codec.encode(Touch()))
    worker.accept()
    lane = ClientLane(None, worker.granted(), Deadline(DEADLINE), latency="normal")
    assert same(called(lane, {"x": np.ones(2)}), [np.ones(2)])
    lane.close()


def test_a_lane_without_a_page_is_not_opened(worker: Worker):
    worker.accept()
    channel = Channel.connect(worker.address, Deadline(DEADLINE))
    ends = os.pipe()
    channel.post(codec.encode(LaneHello(version=codec.PROTOCOL_VERSION, secret=SECRET)), ends)
    assert channel.receive(allowed(DEADLINE)) is None
    sockets.close_all(ends)
    channel.close()
