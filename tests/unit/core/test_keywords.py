"""Misspelt keywords: which name is meant, which stay silent, and the line that the warning points to."""

from __future__ import annotations

import inspect
import warnings

import pytest

from onnx_dl.core.keywords import hint, nearest, warn_of_slips
from onnx_dl.session.inference_session import InferenceSessionProxy

KNOWN = {*inspect.signature(InferenceSessionProxy).parameters, "enable_fallback"} - {"kwargs"}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("tll", "ttl"),
        ("tl", "ttl"),
        ("ttll", "ttl"),
        ("TTL", "ttl"),
        ("_ttl", "ttl"),
        ("time_to_live", "ttl"),
        ("keep_alive", "ttl"),
        ("timeout", "ttl"),
        ("pni", "pin"),
        ("pinned", "pin"),
        ("gruop", "group"),
        ("prioirty", "priority"),
        ("lateny", "latency"),
        ("max_memroy", "max_memory"),
        ("maxMemory", "max_memory"),
        ("max_mem", "max_memory"),
        ("max_memory_limit", "max_memory"),
        ("hard_limit", "max_memory_hard"),
        ("max_run", "max_runs"),
        ("env", "environment"),
        ("preload", "eager"),
        ("hots", "host"),
        ("provider", "providers"),
        ("session_options", "sess_options"),
        ("enable_fallbacks", "enable_fallback"),
    ],
)
def test_what_is_meant(name: str, meant: str) -> None:
    assert nearest(name, KNOWN) == meant


@pytest.mark.parametrize(
    "name", ["something", "device", "device_id", "use_gpu", "verbose", "cache_dir", "dtype", "x", ""]
)
def test_what_resembles_nothing_of_ours(name: str) -> None:
    assert nearest(name, KNOWN) is None


def test_a_word_of_others_for_what_is_not_there() -> None:
    assert nearest("keep_alive", {"pin"}) is None


def test_the_end_of_an_error() -> None:
    assert hint(["tll", "zzz", "pni"], KNOWN) == " Did you mean ttl and pin?"
    assert hint(["zzz"], KNOWN) == ""


def test_the_warning_points_to_the_users_line() -> None:
    """However many functions of ours lie between."""
    deep = {"__name__": "onnx_dl.x", "inside": ("onnx_dl",), "warn_of_slips": warn_of_slips, "KNOWN": KNOWN}
    exec("def call():\n    warn_of_slips(['tll', 'something'], KNOWN, inside)", deep)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        deep["call"]()
        line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
    assert [(str(each.message), each.filename, each.lineno) for each in caught] == [
        ("tll is not an argument of a session and is ignored; did you mean ttl?", __file__, line)
    ]
