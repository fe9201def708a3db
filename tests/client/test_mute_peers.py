"""No method waits beyond its timeout, whatever step of the protocol its peer stops at, and however."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import pytest

import onnx_dl
from onnx_dl import InferenceSessionProxy, ModelHost, OnnxDLError
from onnx_dl.errors import SupervisorStartError, SupervisorTimeout
from onnx_dl.transport.rendezvous import HostEntry
from tests.support.scripted import HOWS, STEPS, scripted
from tests.support.sharing import own_runtime
from tests.support.slow import identity_model
from tests.support.waiting import allowed

pytestmark = pytest.mark.slow

TIMEOUT: Final = 0.3
BOUND: Final = TIMEOUT + 1.5
"""The deadline, the grace of a run that is told to end, and a busy machine."""

X = {"x": np.ones(4, np.float32)}


def hold(proxy: InferenceSessionProxy) -> None:
    with proxy.session(timeout=TIMEOUT):
        proxy.run(None, X, timeout=TIMEOUT)


def with_callback(proxy: InferenceSessionProxy) -> None:
    proxy.run_async(None, X, lambda *_: None, None, timeout=TIMEOUT)


METHODS: Final[dict[str, Callable[[InferenceSessionProxy], Any]]] = {
    "run": lambda proxy: proxy.run(None, X, timeout=TIMEOUT),
    "arun": lambda proxy: asyncio.run(proxy.arun(None, X, timeout=TIMEOUT)),
    "run_async": with_callback,
    "load": lambda proxy: proxy.load(timeout=TIMEOUT),
    "aload": lambda proxy: asyncio.run(proxy.aload(timeout=TIMEOUT)),
    "session": hold,
    "preload": lambda proxy: proxy._handle.host.preload([proxy], timeout=TIMEOUT),
}
BY_LANE: Final = ("run", "arun", "run_async", "load", "session")
"""Methods that use a lane in ways of their own; ``aload`` and ``preload`` do what ``load`` does."""


@pytest.fixture(params=["socket", "zmq"])
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How calls travel."""
    monkeypatch.setenv("ONNX_DL_LANE", request.param)
    return str(request.param)


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert took < allowed(seconds), f"took {took:.2f} s"


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(
    ("lane", "step", "method"),
    [("socket", step, method) for step in STEPS for method in METHODS]
    # Only these steps depend on how calls travel.
    + [("zmq", step, method) for step in ("lane", "call", "fate") for method in BY_LANE],
    indirect=["lane"],
)
def test_each_step_with_each_method(
    lane: str, step: str, how: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scripted(monkeypatch, step, how), ModelHost() as host:
        proxy = InferenceSessionProxy(identity_model(), providers=["CPUExecutionProvider"], host=host)
        with at_most(BOUND), pytest.raises((OnnxDLError, ExceptionGroup)) as raised:
            METHODS[method](proxy)
        if isinstance(raised.value, ExceptionGroup):
            assert all(isinstance(error, OnnxDLError) for error in raised.value.exceptions)


@pytest.mark.parametrize(
    "question", ["snapshot", "is_loaded", "unload", "open by name", "unload at the host"]
)
def test_a_mute_supervisor_is_told_of(question: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNX_DL_START_TIMEOUT", str(patience := allowed(0.8)))  # the greeting is in time
    monkeypatch.setenv("ONNX_DL_CONFIG", "host.toml")
    with scripted(monkeypatch, "acquire", "mute"), ModelHost() as host:
        proxy = InferenceSessionProxy(identity_model(), providers=["CPUExecutionProvider"], host=host)
        with pytest.raises(OnnxDLError):
            proxy.load(timeout=0.1)
        ask: dict[str, Callable[[], object]] = {
            "snapshot": host.snapshot,
            "is_loaded": lambda: proxy.is_loaded,
            "unload": proxy.unload,
            "open by name": lambda: host.open("asr"),
            "unload at the host": lambda: host.unload("asr"),
        }
        with (
            at_most(2 * patience + 1.5),
            pytest.raises(SupervisorTimeout, match="is alive but did not answer"),
        ):
            ask[question]()


def test_a_supervisor_that_greets_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNX_DL_START_TIMEOUT", "0.4")
    with (
        scripted(monkeypatch, "greeting", "mute"),
        ModelHost() as host,
        at_most(2.0),
        pytest.raises(OnnxDLError, match="supervisor"),
    ):
        host.start()


def test_a_mute_shared_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the name and the lock, and answers nobody."""
    with own_runtime(monkeypatch), scripted(monkeypatch, "greeting", "mute") as script:
        monkeypatch.setenv("ONNX_DL_START_TIMEOUT", "0.4")
        place = HostEntry("mine")
        place.publish(*script.start()[1:], managed=False)
        with monkeypatch.context() as patched:
            patched.setattr(HostEntry, "holder", lambda _: os.getpid())
            with at_most(2.0), pytest.raises(SupervisorStartError, match="does not answer"):
                onnx_dl.connect("mine")
