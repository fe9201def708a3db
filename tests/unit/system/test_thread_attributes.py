"""What a thread hands on: written down, sent, and taken as far as the system allows."""

from __future__ import annotations

import os
from typing import Any

import pytest

from onnx_dl.concurrency.background import Background
from onnx_dl.core.environment import ThreadAttributes
from onnx_dl.errors import ProtocolError
from onnx_dl.protocol import codec, template
from onnx_dl.system import thread_attributes

NICE = os.getpriority(os.PRIO_PROCESS, 0)


def taken(by: ThreadAttributes) -> ThreadAttributes:
    """What a thread has that has taken this."""

    def work(_: object) -> ThreadAttributes:
        thread_attributes.apply(by)
        return thread_attributes.of_this_thread()

    return Background(work, "takes").wait(None, "the thread")


def test_all_of_it() -> None:
    mine = thread_attributes.of_this_thread()
    assert None not in (mine.processors, mine.nice, mine.policy, mine.umask)
    assert taken(mine) == mine
    own = ThreadAttributes(
        processors=thread_attributes._mask({min(os.sched_getaffinity(0))}), nice=NICE + 1, policy=3
    )
    assert taken(own) == ThreadAttributes(
        processors=own.processors, nice=NICE + 1, policy=3, umask=mine.umask
    )
    assert thread_attributes.of_this_thread() == mine


@pytest.mark.parametrize("processors", [{0}, {7, 8}, {3, 64, 1023}])
def test_processors_travel_as_bits(processors: set[int]) -> None:
    assert set(thread_attributes._bits(thread_attributes._mask(processors))) == processors


def test_what_cannot_be_stays() -> None:
    mine = thread_attributes.of_this_thread()
    assert taken(ThreadAttributes(processors=b"\0" * 1000 + b"\1", policy=200, priority=99)) == mine
    assert taken(ThreadAttributes(processors=b"\0")) == mine
    assert taken(ThreadAttributes()) == mine


@pytest.mark.parametrize(
    "wrong", [{"nice": 20}, {"umask": -1}, {"processors": b"\1" * 1025}, {"priority": 100}, {"policy": -1}]
)
def test_what_is_sent_is_checked(wrong: dict[str, Any]) -> None:
    message = template.Spawn(
        worker_id=1, identity=b"", control="", thread_attributes=ThreadAttributes(**wrong)
    )
    with pytest.raises(ProtocolError):
        template.on_template(codec.encode(message))
