"""The models of one group that one application has, as a host knows them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest

from onnx_dl import EventType, ModelEvent, ModelHost
from onnx_dl.core.spec import ModelSpec
from onnx_dl.errors import InstallationError

SPEC = ModelSpec(key="k", name="m", cwd="/", group="g")


class Proxy:
    spec = SPEC

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    def companion(self) -> None:
        if self._error is not None:
            raise self._error


class Model:
    """Also its own worker."""

    told = False

    @property
    def worker(self) -> Model:
        return self

    def on_event(self, event: ModelEvent) -> None:
        self.told = True


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_proxies_are_made_in_one_thread_while_another_loads_the_group(hasty: None) -> None:
    with ModelHost() as host:
        made: list[Proxy] = []
        done = threading.Event()

        def make() -> None:
            for _ in range(3000):
                made.append(Proxy())
                host.join(made[-1])
            done.set()

        thread = threading.Thread(target=make)
        thread.start()
        while not done.is_set():
            assert host._models.companions(SPEC) == []
        thread.join()


def test_events_come_while_models_are_opened(hasty: None) -> None:
    """In the thread of the connection, which would end."""
    event = ModelEvent(seq=1, type=EventType.UNLOADED, at=0.0, model="m", key="m", worker_id=1)
    with ModelHost() as host:
        models = [Model() for _ in range(3000)]
        done = threading.Event()

        def make() -> None:
            for number, model in enumerate(models):
                host._models._models[str(number)] = model  # type: ignore[assignment]
            done.set()

        thread = threading.Thread(target=make)
        thread.start()
        while not done.is_set():
            host._models.on_event(event)
        thread.join()
        host._models.on_event(event)  # the thread may have been faster than the first one
    assert all(model.told for model in models)


@pytest.mark.parametrize("error", [InstallationError("no engine"), OSError("no descriptors")])
def test_one_that_cannot_be_had_is_no_error_of_another(error: Exception) -> None:
    with ModelHost() as host:
        proxy = Proxy(error)
        host.join(proxy)
        assert host._models.companions(SPEC) == []


def test_groups_of_proxies_that_are_gone_are_forgotten() -> None:
    with ModelHost() as host:
        for number in range(100):
            proxy = Proxy()
            proxy.group = f"request-{number}"
            host.join(proxy)
        assert len(host._models._members) == 1
