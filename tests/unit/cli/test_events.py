"""How events are followed, with a clock that is turned by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from onnx_dl.cli.events import follow
from onnx_dl.client.event_dispatch import EventBus
from onnx_dl.core.events import EventType, ModelEvent
from onnx_dl.errors import SupervisorDied


def made(seq: int) -> ModelEvent:
    return ModelEvent(seq=seq, type=EventType.LOADING, at=0.0, model="m.onnx", key="k", worker_id=1)


def never() -> None:
    raise AssertionError("there was no pause")


class Clock:
    """Goes on by one second each time that it is looked at."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def told(check: Callable[[], None], published: int, closed: bool, **terms: float) -> list[int]:
    bus, heard = EventBus(), []
    stream = bus.stream()
    for seq in range(published):
        bus.publish(made(seq))
    if closed:
        bus.close()
    follow(stream, lambda event: heard.append(event.seq), check, clock=Clock(), **terms)
    return heard


def test_until_the_stream_ends() -> None:
    assert told(never, 3, closed=True) == [0, 1, 2]


def test_until_the_time_is_over() -> None:
    assert told(never, 9, closed=False, seconds=4.0) == [0, 1, 2]


def test_what_came_before_the_end_of_the_host_is_told() -> None:
    bus, heard = EventBus(), []
    stream = bus.stream()
    bus.publish(made(1))

    def ended() -> None:
        raise SupervisorDied("gone")

    with pytest.raises(SupervisorDied):
        follow(stream, heard.append, ended)
    assert heard == [made(1)]
