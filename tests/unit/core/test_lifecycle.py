"""The table of states, cell by cell, and the page that is generated from it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from onnx_dl.core import lifecycle
from onnx_dl.core.lifecycle import LifecycleEvent, ModelState, transition
from onnx_dl.errors import InvalidTransition

STATES = ("unloaded", "loading", "ready", "draining", "failed")
EVENTS = ("LoadRequested", "WorkerReady", "DrainRequested", "WorkerExited")
# HOUSE.md, "States"; an empty cell is refused.
TABLE = {
    "unloaded": ("loading", "", "", ""),
    "loading": ("", "ready", "draining", "failed"),
    "ready": ("", "", "draining", "failed"),
    "draining": ("", "draining", "draining", "unloaded"),
    "failed": ("loading", "", "", ""),
}
PAGE = Path(__file__).parents[3] / "docs" / "lifecycle.md"


def test_names():
    assert tuple(ModelState) == STATES
    assert tuple(LifecycleEvent) == EVENTS


@pytest.mark.parametrize(("state", "event"), list(itertools.product(STATES, EVENTS)))
def test_every_cell(state, event):
    expected = TABLE[state][EVENTS.index(event)]
    if expected:
        assert transition(ModelState(state), LifecycleEvent(event)) == expected
    else:
        with pytest.raises(InvalidTransition, match=rf"{event} cannot happen to a model that is {state}"):
            transition(ModelState(state), LifecycleEvent(event))


def test_refusal_carries_the_history():
    with pytest.raises(InvalidTransition, match=r"report it with this history: first; second$"):
        transition(ModelState.READY, LifecycleEvent.WORKER_READY, ["first", "second"])
    with pytest.raises(InvalidTransition, match=r"history: none$"):
        transition(ModelState.READY, LifecycleEvent.WORKER_READY)


def test_only_an_exit_ends_a_live_state():
    live = {"loading", "ready", "draining"}
    for (state, event), after in lifecycle.TRANSITIONS.items():
        if state in live and after not in live:
            assert event == LifecycleEvent.WORKER_EXITED


def test_page_is_not_stale():
    assert PAGE.read_text() == lifecycle.markdown(), (
        "run: python -m onnx_dl.core.lifecycle > docs/lifecycle.md"
    )
