"""Which variables can be set, and who sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from onnx_dl.core.environment import LONGEST, Environment, parse, parse_pairs
from onnx_dl.errors import ConfigError, ProtocolError
from onnx_dl.protocol import codec, template


def test_what_can_be() -> None:
    assert parse(None) == parse({}) == Environment()
    assert not parse({})
    given = parse({"A": "ä", "PATH": Path("/x"), "B": None, "C": ""})
    assert given.over({"A": "1", "B": "2", "D": "3"}) == {"A": "ä", "PATH": "/x", "C": "", "D": "3"}
    assert parse(given) is given


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["A=1"], "environment is a list; give a dict"),
        ("A=1", "environment is a str; give a dict"),
        ({"": "1"}, "'' is not a variable name"),
        ({"A=B": "1"}, "'A=B' is not a variable name"),
        ({"A\0": "1"}, "is not a variable name"),
        ({1: "1"}, "1 is not a variable name"),
        ({"A": 4}, "A is a value of type int; give text"),
        ({"A": True}, "A is a value of type bool; give text"),
        ({"A": b"1"}, "A is a value of type bytes; give text"),
        ({"A": "secret\0"}, "A is text with NUL in it"),
        ({"A": "secret\udcff"}, "not valid UTF-8"),
        ({"ONNX_DL_START": "exec"}, "ONNX_DL_START is a setting of onnx-dl"),
        ({"A": "x" * LONGEST}, f"environment has {LONGEST + 3} bytes"),
    ],
)
def test_what_cannot_be(wrong: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(wrong)
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)


def test_values_are_not_shown() -> None:
    assert repr(parse({"TOKEN": "secret", "A": None})) == "Environment(A, TOKEN)"
    assert len(parse({"TOKEN": "secret"}).tag) == 8


def test_one_from_elsewhere_is_checked() -> None:
    spawn = template.Spawn(worker_id=1, identity=b"", control="", environment=parse({"A": "1"}))
    data = codec.encode(spawn)
    assert template.on_template(data).environment == parse({"A": "1"})
    plain = msgspec.msgpack.decode(data)
    for wrong in ({"A=": "1"}, {"A": 1}, {"ONNX_DL_X": "1"}, {"A": "x" * LONGEST}):
        plain["environment"] = {"variables": wrong}
        with pytest.raises(ProtocolError):
            template.on_template(msgspec.msgpack.encode(plain))


def test_pairs() -> None:
    assert parse_pairs(["A=1", "B=x=y", "C="]) == {"A": "1", "B": "x=y", "C": ""}
    for wrong in ("A", "=1", ""):
        with pytest.raises(ConfigError, match="write NAME=VALUE"):
            parse_pairs([wrong])
