"""Events: wording, the bus, streams."""

from __future__ import annotations

import threading

import pytest

from onnx_dl.client.event_dispatch import EventBus
from onnx_dl.core.events import EventType, ModelEvent
from onnx_dl.core.text import format_bytes
from tests.support.waiting import DEADLINE, allowed


def made(seq: int = 1, kind: str = "loading", **fields) -> ModelEvent:
    return ModelEvent(seq=seq, type=EventType(kind), at=0.0, model="m.onnx", key="k", worker_id=1, **fields)


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (made(), "loading m.onnx"),
        (
            made(kind="ready", seconds=1.23456, rss=12_345_678, gpu=None, pid=7),
            "ready m.onnx, loaded in 1.235 s, RSS 12.3 MB, pid 7",
        ),
        (made(kind="ready", seconds=0.0, gpu=5_000_000), "ready m.onnx, loaded in 0.000 s, GPU 5.0 MB"),
        (made(kind="draining", reason="ttl", pid=7), "draining m.onnx, reason ttl, pid 7"),
        (
            made(kind="unloaded", reason="request", seconds=2.0, freed=0, rss=9_000_000, pid=7),
            "unloaded m.onnx, reason request, loaded for 2.000 s, gave back 0.0 MB, pid 7",
        ),
        (made(kind="thrash", detail="a, b were loaded again"), "thrash: a, b were loaded again"),
        (made(kind="failed", detail="no such file"), "failed m.onnx, no such file"),
        (made(kind="failed", detail="gone", retry_after=2.0), "failed m.onnx, retry in 2.0 s, gone"),
    ],
)
def test_wording(event, line):
    assert str(event) == line


def test_bytes():
    assert format_bytes(0) == "0.0 MB"
    assert format_bytes(12_345_678) == "12.3 MB"


def test_listeners_hear_in_order_until_they_stop():
    bus, heard = EventBus(), []
    stop = bus.listen(lambda e: heard.append(("first", e.seq)))
    bus.listen(lambda e: heard.append(("second", e.seq)))
    assert bus.publish(made(1)) == []
    stop()
    stop()  # twice is once
    bus.publish(made(2))
    assert heard == [("first", 1), ("second", 1), ("second", 2)]


def test_listener_that_raises_hinders_nobody_and_is_returned():
    bus, heard = EventBus(), []
    error = RuntimeError("mine")

    def bad(event):
        raise error

    bus.listen(bad)
    bus.listen(heard.append)
    stream = bus.stream()
    assert bus.publish(made(1)) == [(bad, error)]
    assert heard == [made(1)]
    assert stream.get(0) == made(1)


def test_listener_may_stop_itself_and_add_others():
    bus, heard = EventBus(), []

    def once(event):
        stop()
        bus.listen(heard.append)

    stop = bus.listen(once)
    bus.publish(made(1))
    bus.publish(made(2))
    assert heard == [made(2)]


def test_stream_starts_when_it_is_made():
    bus = EventBus()
    bus.publish(made(1))
    stream = bus.stream()
    bus.publish(made(2))
    bus.publish(made(3))
    assert [stream.get(0).seq, next(stream).seq] == [2, 3]


def test_stream_times_out():
    stream = EventBus().stream()
    with pytest.raises(TimeoutError, match=r"within 0 seconds"):
        stream.get(0)


def test_stream_drops_the_oldest_which_shows_as_a_gap():
    bus = EventBus()
    stream = bus.stream(limit=3)
    for seq in range(1, 6):
        bus.publish(made(seq))
    assert [stream.get(0).seq for _ in range(3)] == [3, 4, 5]
    with pytest.raises(TimeoutError):
        stream.get(0)


def test_closed_stream_gives_what_came_then_ends():
    bus = EventBus()
    with bus.stream() as stream:
        bus.publish(made(1))
        bus.publish(made(2))
    bus.publish(made(3))
    assert [event.seq for event in stream] == [1, 2]
    with pytest.raises(StopIteration):
        stream.get(0)
    stream.close()  # twice is once


def test_streams_do_not_share():
    bus = EventBus()
    one, two = bus.stream(), bus.stream()
    one.close()
    bus.publish(made(1))
    assert two.get(0).seq == 1
    assert list(one) == []


def test_closing_the_bus_ends_a_stream_that_waits():
    bus = EventBus()
    stream, got = bus.stream(), []
    waiting = threading.Thread(target=lambda: got.extend(stream))
    waiting.start()
    bus.publish(made(1))
    bus.close()
    waiting.join(allowed(DEADLINE))
    assert not waiting.is_alive()
    assert got == [made(1)]


def test_many_publishers_lose_nothing():
    bus = EventBus()
    stream = bus.stream()
    threads = [
        threading.Thread(target=lambda n=n: [bus.publish(made(n * 1000 + i)) for i in range(200)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    got = [stream.get(allowed(DEADLINE)).seq for _ in range(800)]
    for thread in threads:
        thread.join()
    assert sorted(got) == sorted(n * 1000 + i for n in range(4) for i in range(200))
    for n in range(4):
        own = [seq for seq in got if seq // 1000 == n]
        assert own == sorted(own)


def test_what_an_outdated_model_means_is_said():
    said = str(made(kind="outdated", pid=7, detail="/w.bin"))
    assert said.startswith(
        "outdated m.onnx, pid 7: /w.bin has changed since it was loaded; existing sessions keep"
    )
