"""Control in a child and in the first process: the same answers, refusals and deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import pytest

from onnx_dl.core.settings import Settings
from onnx_dl.server.interfaces import (
    DurationCount,
    ModelState,
    RegionStatus,
    Served,
    VersionStatistics,
)
from onnx_dl.server.options import ServeOptions
from onnx_dl.server.processes import host
from onnx_dl.server.processes import messages as m
from onnx_dl.server.processes.front import extensions_of
from onnx_dl.server.processes.local_control import selected
from onnx_dl.server.processes.remote_control import RemoteControl, answered
from onnx_dl.server.v2.failures import RequestFailure, invalid, unavailable
from tests.support.waiting import DEADLINE

REGION = RegionStatus("r", "/k", 4, 16)
COUNTS = VersionStatistics(
    name="m", version="1", inference_count=3, success=DurationCount(3, 9), failures={"OTHER": 1}
)
STATE = ModelState(name="m", version="1", state="ready", ttl=5.0, pid=7, memory=8, loads=1, last_unload="ttl")


class Owner:
    """The first process's control, which notes what it is asked for."""

    def __init__(self, failure: RequestFailure | None = None) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self._failure = failure

    def _note(self, *what: Any) -> None:
        self.asked.append(what)
        if self._failure is not None:
            raise self._failure

    async def load(self, name: str, parameters: dict[str, Any]) -> None:
        self._note("load", name, parameters)

    async def unload(self, name: str, parameters: dict[str, Any]) -> None:
        self._note("unload", name, parameters)

    async def register_region(self, name: str, key: str, offset: int, byte_size: int) -> None:
        self._note("register_region", name, key, offset, byte_size)

    async def unregister_region(self, name: str | None) -> None:
        self._note("unregister_region", name)

    async def region_status(self, name: str | None) -> list[RegionStatus]:
        self._note("region_status", name)
        return [REGION]

    async def statistics(self, name: str = "", version: str = "") -> list[VersionStatistics]:
        self._note("statistics", name, version)
        return [COUNTS]

    async def model_state(self, name: str, version: str = "") -> ModelState:
        self._note("model_state", name, version)
        return STATE

    async def metrics(self, accept: str = "") -> tuple[bytes, str]:
        self._note("metrics", accept)
        return b"text", "kind"


class Wire:
    """A link whose other end answers by a control, through the bytes of the messages; None: never."""

    def __init__(self, owner: Owner | None, timeout: float = DEADLINE) -> None:
        self._owner = owner
        self.control = RemoteControl(self, timeout)  # type: ignore[arg-type]
        self._tasks: list[asyncio.Task[None]] = []

    def send(self, message: msgspec.Struct) -> None:
        if self._owner is not None:
            question = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=m.ToOwner)
            self._tasks.append(asyncio.get_running_loop().create_task(self._answer(question)))

    async def _answer(self, question: Any) -> None:
        answer: m.Done | m.Refusal
        try:
            answer = await answered(self._owner, question)  # type: ignore[arg-type]
        except RequestFailure as failure:
            answer = m.refusal(question.ticket, failure)
        self.control.on_answer(msgspec.msgpack.decode(msgspec.msgpack.encode(answer), type=m.ToChild))


CALLS: list[tuple[Callable[[Any], Coroutine[Any, Any, Any]], tuple[Any, ...], Any]] = [
    (lambda c: c.load("m", {"config": "{}", "n": 1}), ("load", "m", {"config": "{}", "n": 1}), None),
    (lambda c: c.unload("m", {"withdraw": False}), ("unload", "m", {"withdraw": False}), None),
    (lambda c: c.register_region("r", "/k", 0, 5), ("register_region", "r", "/k", 0, 5), None),
    (lambda c: c.unregister_region(None), ("unregister_region", None), None),
    (lambda c: c.region_status("r"), ("region_status", "r"), [REGION]),
    (lambda c: c.statistics("m"), ("statistics", "m", ""), [COUNTS]),
    (lambda c: c.model_state("m", "1"), ("model_state", "m", "1"), STATE),
    (lambda c: c.metrics("text/plain"), ("metrics", "text/plain"), (b"text", "kind")),
]


@pytest.mark.parametrize(("call", "asked", "result"), CALLS, ids=[asked[0] for _, asked, _ in CALLS])
def test_every_operation_is_carried_out_by_the_first_process(call: Any, asked: Any, result: Any) -> None:
    async def test() -> None:
        owner = Owner()
        assert await call(Wire(owner).control) == result
        assert owner.asked == [asked]

    asyncio.run(test())


@pytest.mark.parametrize("call", [call for call, *_ in CALLS], ids=[asked[0] for _, asked, _ in CALLS])
@pytest.mark.parametrize("failure", [invalid("no"), unavailable("not now", 2.5)])
def test_a_refusal_is_the_same_in_a_child(call: Any, failure: RequestFailure) -> None:
    async def test() -> None:
        with pytest.raises(RequestFailure) as caught:
            await call(Wire(Owner(failure)).control)
        assert vars(caught.value) == vars(failure) and str(caught.value) == str(failure)

    asyncio.run(test())


def test_a_first_process_that_does_not_answer() -> None:
    async def test() -> None:
        control = Wire(None, timeout=0.05).control
        with pytest.raises(RequestFailure, match="does not answer") as caught:
            await control.statistics()
        assert caught.value.http == 503 and not control._tickets._waiting

    asyncio.run(test())


def test_a_caller_that_has_gone_leaves_no_ticket() -> None:
    async def test() -> None:
        control = Wire(None).control
        asked = asyncio.ensure_future(control.load("m", {}))
        await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        await asyncio.sleep(0)
        assert not control._tickets._waiting

    asyncio.run(test())


def test_an_unknown_operation_is_refused() -> None:
    with pytest.raises(RequestFailure, match="no operation"):
        asyncio.run(answered(Owner(), m.Ask(ticket=1, operation="__init__")))  # type: ignore[arg-type]


# --- decisions --------------------------------------------------------------------------------------------


def served(name: str, version: str) -> Served:
    return Served(name=name, version=version, path="/x", generation="")


def test_statistics_are_of_what_is_served_now() -> None:
    gone = VersionStatistics(name="gone", version="1", inference_count=9)
    found = selected([gone, COUNTS], [served("m", "1"), served("m", "2")])
    assert [(each.name, each.version, each.inference_count) for each in found] == [
        ("m", "1", 3),
        ("m", "2", 0),
    ]


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({}, set()),
        ({"model_control": "poll"}, set()),
        ({"model_control": "explicit"}, {"model_repository"}),
        ({"client_shm": "copy"}, {"system_shared_memory"}),
        ({"client_shm": "map", "model_control": "explicit"}, {"system_shared_memory", "model_repository"}),
    ],
)
def test_an_extension_is_claimed_if_its_calls_work(options: dict[str, Any], more: set[str]) -> None:
    always = {"binary_tensor_data", "model_configuration", "statistics"}
    assert set(extensions_of(ServeOptions(**options))) == always | more


def test_settings_of_the_host() -> None:
    base = Settings(isolation="off", host="default", metrics="", memory_limit=1)
    plain, explicit = host.settings_of(ServeOptions(), base)
    assert (plain.isolation, plain.host, plain.metrics, plain.memory_limit) == ("on", "", "127.0.0.1:0", 1)
    assert explicit == [] and plain.config == ""
    given, explicit = host.settings_of(ServeOptions(memory_limit=5, config="/h.toml"), base)
    assert (given.memory_limit, given.config, explicit) == (5, "/h.toml", ["memory_limit"])
    assert host.settings_of(ServeOptions(), Settings(metrics="127.0.0.1:9"))[0].metrics == "127.0.0.1:9"
