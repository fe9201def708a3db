"""The supervisor's loop with processes that are made up: which failure ends what."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import zmq

from onnx_dl.core.lifecycle import ModelState
from onnx_dl.core.settings import Settings
from onnx_dl.protocol import codec
from onnx_dl.protocol.control import (
    AskStatus,
    ClientHello,
    Denied,
    Granted,
    Published,
    Refused,
    SetTtl,
    Unload,
    Unloaded,
    Welcome,
    WorkerStarted,
    Wrote,
    on_lifeline,
    to_client,
)
from onnx_dl.supervisor import loop as loops
from onnx_dl.supervisor.loop import Supervisor
from onnx_dl.supervisor.outlet import MOST_UNREAD
from onnx_dl.transport import sockets, zeromq
from onnx_dl.transport.gauges import Reading
from onnx_dl.transport.sockets import Channel, fresh_address
from tests.support.builders import acquire, ready
from tests.support.waiting import DEADLINE, eventually


class Made:
    """Processes that are made up.  ``refuses``: what starting a worker raises."""

    def __init__(self) -> None:
        self.identities: dict[int, bytes] = {}
        self.killed: list[int] = []
        self.refuses: Exception | None = None
        self.spawn_queue = mock.Mock(has_spare=False)

    def attach(self, control: str, witness: Any, wrote: Any, connections: Any) -> None:
        self.witness, self.wrote = witness, wrote

    def spawn(self, worker_id: int, identity: bytes, blobs: Any, birth: Any) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.identities[worker_id] = identity

    def kill(self, worker_id: int) -> None:
        self.killed.append(worker_id)

    def reap(self) -> None:
        for worker_id in self.killed:
            if self.identities.pop(worker_id, None):
                self.witness.exited(worker_id, 9, "", Reading())

    def sources(self) -> list[int]:
        return []

    def next_deadline(self) -> None: ...
    def on_tick(self) -> None: ...
    def handle(self, ready: Any) -> None: ...
    def greeted(self, worker_id: int) -> None: ...
    def drain(self, worker_id: int) -> None:
        self.wrote(Wrote(worker_id=worker_id, model="m.onnx", pid=77, text=b"what it said\n"))

    def end_saver(self) -> None: ...
    def close(self) -> None: ...
    def readings(self) -> dict[int, Reading]:
        return {}


class Application:
    """One client of it."""

    def __init__(self, rig: Rig, name: bytes) -> None:
        self.rig = rig
        self.lifeline = Channel.connect(f"{rig.address}/lifeline", DEADLINE)
        self.lifeline.send(codec.encode(ClientHello(version=codec.PROTOCOL_VERSION, secret="s", client=name)))
        rig.until(self.lifeline.readable)
        received = self.lifeline.receive(0)
        assert received is not None and isinstance(on_lifeline(received[0]), Welcome)
        self.control = zeromq.dealer(rig.context, f"{rig.address}/control", name)
        self.heard: list[Any] = []

    def say(self, message: codec.Message) -> None:
        self.control.send(codec.encode(message))

    def answer(self, ticket: int) -> Any:
        """What it is told on this ticket."""

        def told() -> bool:
            while self.control.poll(0):
                self.heard.append(to_client(self.control.recv()))
            return any(getattr(each, "ticket", None) == ticket for each in self.heard)

        self.rig.until(told)
        (answer,) = [each for each in self.heard if getattr(each, "ticket", None) == ticket]
        return answer

    @property
    def is_gone(self) -> bool:
        return self.lifeline.is_dead()

    def close(self) -> None:
        self.lifeline.close()
        self.control.close(0)


class Rig:
    """A supervisor that is turned by hand."""

    def __init__(self) -> None:
        self.address = fresh_address("test")
        self.made = Made()
        self.context = zmq.Context()
        settings = Settings(python="python", cache="off", memory_limit=10_000_000_000)
        processes: Any = self.made
        self.supervisor = Supervisor(processes, self.address, "s", settings)
        self.scheduler = self.supervisor._scheduler
        self.applications: list[Application] = []
        self.workers: dict[int, Any] = {}

    def turn(self) -> None:
        supervisor = self.supervisor
        supervisor._handle(sockets.readable(supervisor._sources(), 0.001))
        self.made.reap()
        supervisor._on_tick(time.monotonic())

    def until(self, happened: Any) -> None:
        def turned() -> bool:
            self.turn()
            return bool(happened())

        eventually(turned, "what the test waits for")

    def application(self, name: bytes) -> Application:
        self.applications.append(Application(self, name))
        return self.applications[-1]

    def worker(self, worker_id: int) -> None:
        """The worker is there and has loaded its model."""
        self.until(lambda: worker_id in self.made.identities)
        identity = self.made.identities[worker_id]
        self.made.witness.spawned(worker_id, 100 + worker_id)
        self.workers[worker_id] = zeromq.dealer(self.context, f"{self.address}/control", identity)
        self.workers[worker_id].send(codec.encode(WorkerStarted(worker_id=worker_id)))
        self.workers[worker_id].send(codec.encode(ready(worker_id)))

    def states(self) -> dict[str, ModelState]:
        return {status.key: status.state for status in self.scheduler.snapshot(0.0)}

    def close(self) -> None:
        for application in self.applications:
            application.close()
        for worker in self.workers.values():
            worker.close(0)
        self.supervisor._control.router.close(0)
        self.supervisor._clients.close()
        self.supervisor._control.stderr.end()
        self.context.term()


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    class NoSignals:
        def __init__(self, foreground: bool) -> None: ...
        def fileno(self) -> int:
            return never

    never = os.eventfd(0)
    monkeypatch.setattr(loops, "SignalPipe", NoSignals)
    rig = Rig()
    yield rig
    rig.close()
    os.close(never)


def loaded(rig: Rig, application: Application, key: str, ticket: int) -> int:
    application.say(acquire(ticket, proxy=ticket, key=key))
    before = set(rig.made.identities)
    rig.until(lambda: set(rig.made.identities) - before)
    (worker_id,) = set(rig.made.identities) - before
    rig.worker(worker_id)
    assert isinstance(application.answer(ticket), Granted)
    return worker_id


def fails(*_: Any, **__: Any) -> Any:
    raise ArithmeticError("on purpose")


def only_of(worker_id: int, works: Any) -> Any:
    """Fails where it is about this worker."""

    def about(who: Any, *args: Any, **more: Any) -> Any:
        if getattr(who, "worker_id", who) == worker_id:
            raise ArithmeticError("on purpose")
        return works(who, *args, **more)

    return about


def is_typed(answer: Any) -> bool:
    return isinstance(answer, Denied) and answer.failure.family == "onnx_dl"


@pytest.mark.parametrize("fact", ["on_started", "on_ready", "on_spawned"])
def test_a_fact_about_a_worker(rig: Rig, fact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ended, who waits for it is told; the other model and both applications go on."""
    one, other = rig.application(b"one"), rig.application(b"other")
    first = loaded(rig, other, "b", 1)
    monkeypatch.setattr(rig.scheduler, fact, only_of(first + 1, getattr(rig.scheduler, fact)))
    one.say(acquire(2, key="a"))
    rig.worker(first + 1)
    assert is_typed(one.answer(2))
    assert rig.made.killed == [first + 1]
    assert rig.states() == {"a": ModelState.FAILED, "b": ModelState.READY}
    monkeypatch.undo()
    assert loaded(rig, one, "a", 3) == first + 2
    assert not one.is_gone and not other.is_gone


def test_the_end_of_a_worker(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    one = rig.application(b"one")
    first, second = loaded(rig, one, "a", 1), loaded(rig, one, "b", 2)
    monkeypatch.setattr(rig.scheduler, "on_exited", only_of(first, rig.scheduler.on_exited))
    one.say(Unload(ticket=3, key="a", force=True))
    assert isinstance(one.answer(3), Unloaded)
    assert rig.states() == {"a": ModelState.FAILED, "b": ModelState.READY}
    assert rig.scheduler.pids() == {second: 100 + second}
    assert loaded(rig, one, "a", 4) == second + 1


def test_nonsense_from_a_worker(rig: Rig) -> None:
    one = rig.application(b"one")
    first, second = loaded(rig, one, "a", 1), loaded(rig, one, "b", 2)
    rig.workers[first].send(b"nonsense")
    rig.until(lambda: rig.states() == {"a": ModelState.FAILED, "b": ModelState.READY})
    assert list(rig.scheduler.pids()) == [second] and not one.is_gone


def test_a_worker_that_cannot_be_told_anything(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    one = rig.application(b"one")
    first = loaded(rig, one, "a", 1)
    send = rig.supervisor._control.router.send
    identity = rig.made.identities[first]
    monkeypatch.setattr(
        rig.supervisor._control.router,
        "send",
        lambda name, data: fails() if name == identity else send(name, data),
    )
    one.say(Unload(ticket=2, key="a", force=False))  # of which the worker cannot be told
    assert one.answer(2).was_loaded
    assert rig.made.killed == [first]


@pytest.mark.parametrize(
    ("refusal", "code"),
    [(OSError(24, "Too many open files"), "descriptors-exhausted"), (MemoryError(), "supervisor")],
)
def test_a_worker_that_cannot_be_started(rig: Rig, refusal: Exception, code: str) -> None:
    one = rig.application(b"one")
    loaded(rig, one, "a", 1)
    rig.made.refuses = refusal
    one.say(acquire(2, key="b"))
    answer = one.answer(2)
    assert is_typed(answer) and answer.failure.name == code
    assert rig.states()["a"] is ModelState.READY
    kinds = [each.event.type for each in one.heard if isinstance(each, Published)]
    assert kinds[-2:] == ["loading", "failed"], "in the order in which it happened"
    rig.made.refuses = None
    loaded(rig, one, "b", 3)


@pytest.mark.parametrize("request_", [AskStatus(ticket=9), SetTtl(proxy=1, ttl=1.0)])
def test_a_request_that_goes_wrong_ends_its_client(
    rig: Rig, request_: codec.Message, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it held is let go; what the other holds is not."""
    one, other = rig.application(b"one"), rig.application(b"other")
    loaded(rig, one, "a", 1)
    loaded(rig, other, "b", 2)
    monkeypatch.setattr(rig.scheduler, "snapshot", fails)
    monkeypatch.setattr(rig.scheduler, "on_set_ttl", fails)
    one.say(request_)
    rig.until(lambda: one.is_gone)
    monkeypatch.undo()
    assert rig.states() == {"a": ModelState.DRAINING, "b": ModelState.READY}
    assert not other.is_gone


def test_a_model_that_cannot_be_acquired(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caller is told; what that holds besides, it keeps."""
    one = rig.application(b"one")
    loaded(rig, one, "a", 1)
    monkeypatch.setattr(rig.scheduler.admission, "want", fails)
    one.say(acquire(2, proxy=2, key="b"))
    assert is_typed(one.answer(2))
    monkeypatch.undo()
    assert not one.is_gone and rig.states()["a"] is ModelState.READY
    loaded(rig, one, "c", 3)


def test_the_end_of_a_client(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = rig.application(b"one"), rig.application(b"other")
    loaded(rig, one, "a", 1)
    loaded(rig, other, "b", 2)
    monkeypatch.setattr(rig.scheduler, "on_client_gone", fails)
    one.lifeline.close()
    rig.until(lambda: list(rig.supervisor._clients.identities()) == [b"other"])
    leases = {status.key: status.leases for status in rig.scheduler.snapshot(0.0)}
    assert leases == {"a": 0, "b": 1}
    assert not other.is_gone


def test_a_client_that_does_not_read(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is dropped; the others get the event."""
    one, other = rig.application(b"one"), rig.application(b"other")
    for application in (one, other):
        application.say(AskStatus(ticket=1, measure=False))
        application.answer(1)
    send = rig.supervisor._control.router.send
    monkeypatch.setattr(
        rig.supervisor._control.router,
        "send",
        lambda name, data: fails() if name == b"one" else send(name, data),
    )
    loaded(rig, other, "b", 2)
    assert [each.event.type for each in other.heard if isinstance(each, Published)] == ["loading", "ready"]
    rig.until(lambda: one.is_gone)


@pytest.mark.parametrize("broken", ["on_tick", "_decide"])
def test_the_search_for_room(rig: Rig, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for room is told, and the loop does not look for it for ever."""
    one = rig.application(b"one")
    loaded(rig, one, "a", 1)
    rig.scheduler.admission.look_soon(0.0)
    owner = rig.scheduler if broken == "on_tick" else rig.scheduler.admission
    monkeypatch.setattr(owner, broken, fails)
    one.say(acquire(2, proxy=2, key="b"))
    # Handled for sure, not perhaps together with what follows: it loads, or is refused.
    if broken == "on_tick":
        rig.until(lambda: "b" in rig.states())
    else:
        assert is_typed(one.answer(2))
    monkeypatch.undo()
    loaded(rig, one, "c", 3)
    assert rig.states()["a"] is ModelState.READY


def test_who_says_hello_twice_goes(rig: Rig) -> None:
    one = rig.application(b"one")
    one.lifeline.send(codec.encode(ClientHello(version=codec.PROTOCOL_VERSION, secret="s", client=b"two")))
    rig.until(lambda: one.is_gone)


def test_a_name_that_is_taken(rig: Rig) -> None:
    rig.application(b"one")
    thief = Channel.connect(f"{rig.address}/lifeline", DEADLINE)
    thief.send(codec.encode(ClientHello(version=codec.PROTOCOL_VERSION, secret="s", client=b"one")))
    rig.until(thief.readable)
    received = thief.receive(0)
    assert received is not None
    assert on_lifeline(received[0]) == Refused(reason="another client has this name")
    thief.close()


def test_an_application_that_is_gone_before_it_connected(rig: Rig) -> None:
    read_end, write_end = os.pipe()
    rig.supervisor._lifetime.application = read_end
    os.write(write_end, b"gone")
    rig.until(lambda: rig.scheduler.shutdown.finished)
    assert rig.supervisor._lifetime.application is None
    os.close(write_end)


# --- what workers write on stderr --------------------------------------------------------------------------


def test_what_a_load_wrote_comes_before_its_answer(rig: Rig) -> None:
    one = rig.application(b"one")
    worker_id = loaded(rig, one, "a", 1)
    told = [each for each in one.heard if isinstance(each, Wrote | Granted)]
    wrote = Wrote(worker_id=worker_id, model="m.onnx", pid=77, text=b"what it said\n")
    assert told[0] == wrote
    assert isinstance(told[-1], Granted)


def test_an_application_that_does_not_read_is_sent_no_more(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It goes to our own stderr then, and is never what the application is dropped for."""
    one = rig.application(b"one")
    loaded(rig, one, "a", 1)
    monkeypatch.setattr(rig.supervisor._control.router, "unread", lambda name: MOST_UNREAD + 1)
    rig.made.drain(1)
    rig.supervisor._control.pass_on_stderr()
    rig.supervisor._control.stderr.finish(DEADLINE)
    assert capfd.readouterr().err == "what it said\n"
    one.say(AskStatus(ticket=5, measure=False))
    one.answer(5)
    assert sum(isinstance(each, Wrote) for each in one.heard) == 1
