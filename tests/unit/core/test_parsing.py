"""TTLs, environment settings, addresses: every form that is taken and every form that is refused."""

from __future__ import annotations

import fractions
import math
import os
import sys

import numpy as np
import pytest

from onnx_dl.core import parsing
from onnx_dl.core.parsing import parse_gpu_limit, parse_ttl
from onnx_dl.core.settings import Settings, settings
from onnx_dl.errors import ConfigError, PlatformError
from onnx_dl.system import resources
from onnx_dl.transport.sockets import fresh_address

ACCEPTED = [
    (-1, -1.0),
    (-1.0, -1.0),
    (np.int64(-1), -1.0),
    (0, 0.0),
    (0.0, 0.0),
    (1, 1.0),
    (90, 90.0),
    (0.25, 0.25),
    (1e9, 1e9),
    (5e-324, 5e-324),
    (np.float32(2.5), 2.5),
    (np.uint8(7), 7.0),
    (fractions.Fraction(1, 2), 0.5),
    ("90s", 90.0),
    ("5m", 300.0),
    ("2h", 7200.0),
    ("250ms", 0.25),
    ("1.5h", 5400.0),
    ("0s", 0.0),
    (" 5 m ", 300.0),
    ("0", 0.0),
    ("-1", -1.0),
    ("-1.0", -1.0),
    (" 90 ", 90.0),
    ("1.5", 1.5),
    (np.str_("5m"), 300.0),
]
REFUSED = [
    None,
    True,
    False,
    np.True_,
    -0.5,
    -2,
    -1.0000001,
    math.nan,
    math.inf,
    -math.inf,
    10**400,
    1j,
    "",
    "-2",
    "-0.5",
    "-1s",
    "- 1",
    "--1",
    "+5",
    "never",
    "1_0",
    "٣",
    "s",
    "5 minutes",
    "5M",
    ".5s",
    "5.s",
    "1e3s",
    "nan",
    "infs",
    "5m 30s",
    "9" * 400 + "s",
    b"5",
    bytearray(b"5"),
    [],
    [5],
    (5,),
    {},
    object(),
    int,
]


@pytest.mark.parametrize(("value", "seconds"), ACCEPTED, ids=repr)
def test_ttl_accepted(value, seconds):
    parsed = parse_ttl(value)
    assert type(parsed) is float
    assert parsed == seconds


@pytest.mark.parametrize("value", REFUSED, ids=lambda v: repr(v)[:20])
def test_ttl_refused_with_the_three_modes_named(value):
    with pytest.raises(ValueError, match="three modes") as caught:
        parse_ttl(value)
    assert type(caught.value) is ConfigError
    text = str(caught.value)
    assert "-1 (stay" in text and "0 (unload after each use)" in text and "greater than 0" in text
    assert repr(value)[:50] in text


def test_defaults():
    assert settings({}) == Settings()
    assert Settings().python == ""
    assert Settings().start == "fork"


@pytest.mark.parametrize("field", ["load_timeout", "start_timeout", "exit_grace", "stable_after"])
@pytest.mark.parametrize(("text", "value"), [("120", 120.0), ("0.5", 0.5), ("1e2", 100.0)])
def test_times_from_the_environment(field, text, value):
    found = settings({f"ONNX_DL_{field.upper()}": text, "HOME": "/", "ONNX_DL_OTHER": "x"})
    assert found == Settings(**{field: value})


def test_texts_from_the_environment():
    assert settings({"ONNX_DL_PYTHON": "/usr/bin/python3.11"}).python == "/usr/bin/python3.11"
    assert settings({"ONNX_DL_START": "exec"}).start == "exec"


@pytest.mark.parametrize("name", ["memory_limit", "gpu_memory_limit", "cache_limit"])
def test_sizes_from_the_environment(name):
    variable = f"ONNX_DL_{name.upper()}"
    assert getattr(settings({variable: "6GiB"}), name) == 6 << 30
    with pytest.raises(ConfigError, match="not a size"):
        settings({variable: "much"})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (5, 5),
        ("6GiB", 6 << 30),
        ("0=6GiB,1=10GiB", {0: 6 << 30, 1: 10 << 30}),
        (" 3 = 500 ", {3: 500}),
        ({0: "6GiB", "1": 7}, {0: 6 << 30, 1: 7}),
    ],
)
def test_limits_of_gpus(given, expected):
    assert parse_gpu_limit(given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "names no device"),
        ({-1: 5}, "-1 is not the number of a device"),
        ({True: 5}, "True is not the number of a device"),
        ({1000: 5}, "1000 is not the number of a device"),
        ({"GPU-aa": 5}, "'GPU-aa' is not the number of a device"),
        ("0=1GiB,0=2GiB", "named twice"),
        ("0=1GiB,", "'' is not the number of a device"),
        ("0=much", "'much' is not a size"),
        ({0: 1.5}, "not a size"),
        (1.5, "not a size"),
    ],
)
def test_what_is_no_limit_of_gpus(given, message):
    with pytest.raises(ConfigError, match=message):
        parse_gpu_limit(given)


def test_limits_of_gpus_from_the_environment():
    assert settings({"ONNX_DL_GPU_MEMORY_LIMIT": "0=1GiB"}).gpu_memory_limit == {0: 1 << 30}
    with pytest.raises(ConfigError, match=r"ONNX_DL_GPU_MEMORY_LIMIT: 'x' is not the number"):
        settings({"ONNX_DL_GPU_MEMORY_LIMIT": "x=1GiB"})


def test_empty_variable_is_no_variable():
    assert settings({"ONNX_DL_LOAD_TIMEOUT": "", "ONNX_DL_START": ""}) == Settings()


def test_bad_choice():
    with pytest.raises(ConfigError, match=r"ONNX_DL_START='spawn' is not one of fork, exec"):
        settings({"ONNX_DL_START": "spawn"})


@pytest.mark.parametrize("text", ["abc", "5m", "-5", "nan", "inf", "-inf", "0x10", "1,5"])
@pytest.mark.parametrize("field", ["load_timeout", "start_timeout", "exit_grace", "stable_after"])
def test_bad_time(field, text):
    """A time that is negative or no number would kill every load, one that is infinite the poll loop."""
    with pytest.raises(ConfigError, match=r"is not a number of seconds from 0 to 1000000") as caught:
        settings({f"ONNX_DL_{field.upper()}": text})
    assert f"ONNX_DL_{field.upper()}={text!r}" in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9464", ("127.0.0.1", 9464)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_addresses(text, address):
    assert parsing.parse_address(text) == address
    assert settings({"ONNX_DL_METRICS": text}).metrics == text


@pytest.mark.parametrize(
    "text", ["9464", ":9464", "host", "host:", "host:65536", "::1:9464", "a b:1", "http://h:1"]
)
def test_no_address(text):
    with pytest.raises(ConfigError, match=r"^ONNX_DL_METRICS: .* write host:port"):
        settings({"ONNX_DL_METRICS": text})


def test_settings_come_from_the_real_environment_by_default(monkeypatch):
    monkeypatch.setenv("ONNX_DL_EXIT_GRACE", "1.25")
    assert settings().exit_grace == 1.25


def test_platform(monkeypatch):
    resources.check_platform()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(
        PlatformError, match=r"need Linux .* this is darwin\. By default, models run in-process"
    ):
        resources.check_platform()


def test_addresses_are_unguessable_and_fit_a_socket():
    found = {fresh_address("worker") for _ in range(100)}
    assert len(found) == 100
    for address in found:
        assert address.startswith(f"onnx-dl/{os.getuid()}/worker/")
        assert len(address) + len("/lifeline") < 100


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ((None, None, None), (None, None, None)),
        (("300MB", None, None), (300_000_000, None, None)),
        ((None, "1GiB", 7), (2**30, 2**30, 7)),
        ((100, "100", 1), (100, 100, 1)),
        ((100, 101, None), (100, 101, None)),
    ],
)
def test_allowances(given, found):
    assert parsing.parse_allowances(*given) == found


@pytest.mark.parametrize("given", [(200, 100, None), ("much", None, None), (None, "", None), (1, 2, 0)])
def test_allowances_that_cannot_be(given):
    with pytest.raises(ConfigError, match=r"max_memory|size|max_runs"):
        parsing.parse_allowances(*given)


@pytest.mark.parametrize(
    ("value", "seconds"), [(2, 2.0), ("2", 2.0), ("0.5", 0.5), ("500ms", 0.5), (" 5m ", 300.0)]
)
def test_a_time_of_a_command_line(value, seconds):
    assert parsing.parse_span(value) == seconds


@pytest.mark.parametrize("value", ["0", 0, "-1", "soon", "", None, math.inf, "inf", "nan"])
def test_what_is_no_time(value):
    with pytest.raises(ConfigError, match="is not a time"):
        parsing.parse_span(value)


@pytest.mark.parametrize(
    ("value", "seconds"), [(0, 0.0), (1.5, 1.5), ("5", 5.0), ("5m", 300.0), (1_000_000, 1e6)]
)
def test_times(value, seconds):
    assert parsing.parse_time(value) == seconds


@pytest.mark.parametrize("value", [-1, True, None, 1e6 + 1, math.inf, math.nan, "-5", "1000h", []])
def test_times_refused(value):
    with pytest.raises(ConfigError, match="is not a time; write seconds from 0 to 1000000, or text such as"):
        parsing.parse_time(value)


@pytest.mark.parametrize("value", [2**63, "9" * 400, "9000000000GiB", True, -1, 1.5, None, "x"])
def test_sizes_refused(value):
    with pytest.raises(ConfigError, match="is not a size"):
        parsing.parse_size(value)


@pytest.mark.parametrize("value", [np.int64(2000), 2000, "2000", "2 kB"])
def test_sizes(value):
    assert parsing.parse_size(value) == 2000


@pytest.mark.parametrize("value", [True, 1, np.True_])
def test_pinned(value):
    assert parsing.parse_pin(value) is True
    assert parsing.parse_pin(type(value)(0)) is False


@pytest.mark.parametrize("value", ["yes", "", 2, None, [], math.nan])
def test_neither_pinned_nor_not(value):
    with pytest.raises(ConfigError, match="is neither True nor False"):
        parsing.parse_pin(value)


@pytest.mark.parametrize("value", [0, -3, np.int64(7), -(2**63), 2**63 - 1])
def test_priorities(value):
    assert parsing.parse_priority(value) == value


@pytest.mark.parametrize("value", ["high", 1.5, True, None, 2**63, 10**30])
def test_priorities_refused(value):
    with pytest.raises(ConfigError, match="is not an integer of 64 bits"):
        parsing.parse_priority(value)


def test_runs_that_no_message_can_tell():
    with pytest.raises(ConfigError, match="is not a number of calls"):
        parsing.parse_runs(2**63)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, None), (0, 0.0), (1.5, 1.5), ("90s", 90.0), (np.float32(2), 2.0), (1e9, None)],
)
def test_timeouts(value: object, seconds: float | None) -> None:
    assert parsing.parse_timeout(value) == seconds


@pytest.mark.parametrize("value", [-1, "soon", True, float("nan"), [1]])
def test_what_is_no_timeout(value: object) -> None:
    with pytest.raises(ConfigError, match="timeout="):
        parsing.parse_timeout(value)
