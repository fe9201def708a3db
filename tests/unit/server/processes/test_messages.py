"""docs/protocol.md lists every message between processes of a server, and every field of it."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import msgspec
import pytest

from onnx_dl.server.processes import messages as m
from onnx_dl.server.v2.failures import invalid, too_many

PAGE = (Path(__file__).parents[4] / "docs" / "protocol.md").read_text()
SECTION = PAGE.split("## Server: between its processes")[1].split("\n## ")[0]
TO_CHILD, TO_OWNER = SECTION.split("| child → owner |")


def told(table: str) -> dict[str, dict[str, str]]:
    """Fields by message, from the rows of a table."""
    rows = re.findall(r"^\| `(\w+)` \| ?(.*?) ?\| [A-Z0-9]", table.replace("\\|", "/"), re.MULTILINE)
    return {
        name: dict(each.replace("/", "|").split(": ", 1) for each in re.findall(r"`([^`]+)`", fields))
        for name, fields in rows
    }


def real(messages: object) -> dict[str, dict[str, str]]:
    return {
        cls.__name__: {
            field.name + ("" if field.required else "?"): cls.__annotations__[field.name]
            for field in msgspec.structs.fields(cls)
        }
        for cls in typing.get_args(messages)
    }


@pytest.mark.parametrize(("table", "messages"), [(TO_CHILD, m.ToChild), (TO_OWNER, m.ToOwner)])
def test_the_page_has_all_messages(table: str, messages: object) -> None:
    assert told(table) == real(messages)


@pytest.mark.parametrize("failure", [invalid("no"), too_many("full", 3.0)])
def test_a_failure_travels_whole(failure: m.RequestFailure) -> None:
    sent = msgspec.msgpack.encode(m.refusal(5, failure))
    received = msgspec.msgpack.decode(sent, type=m.ToChild)
    assert isinstance(received, m.Refusal) and received.ticket == 5
    made = m.failure_of(received)
    assert vars(made) == vars(failure) and str(made) == str(failure)
