"""docs/protocol.md names every message and every field of it, with its type, and no other."""

from __future__ import annotations

import inspect
import re
import typing
from pathlib import Path

import msgspec
import pytest

from onnx_dl.core import environment, events, spec, status, terms
from onnx_dl.protocol import codec, control, failures, lane, template

PAGE = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text()
SECTIONS = {
    "Lifeline: client and supervisor": control.OnLifeline,
    "Control: client → supervisor": control.FromClient,
    "Control: supervisor → client": control.ToClient,
    "Control: worker → supervisor": control.FromWorker,
    "Control: supervisor → worker": control.ToWorker,
    "Template: supervisor and template": template.OnTemplate,
    "Standby: supervisor → standby worker": template.Assign,
    "Lane: both ways": lane.Envelope,
    "Lane: client → worker": lane.LaneRequest,
    "Lane: worker → client": lane.LaneReply,
}
PARTS = "Parts of messages"


def chapters(text: str, level: int) -> dict[str, str]:
    """Title to text of the headings of one level."""
    found = re.split(rf"^{'#' * level} (.+)$", text, flags=re.MULTILINE)[1:]
    assert len(found[::2]) == len(set(found[::2])), "a heading occurs twice"
    return dict(zip(found[::2], found[1::2], strict=True))


def structs() -> dict[str, type[msgspec.Struct]]:
    """Every struct that travels, but the abstract base."""
    return {
        name: cls
        for module in (
            codec,
            control,
            failures,
            lane,
            template,
            spec,
            status,
            terms,
            environment,
            events,
        )
        for name, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, msgspec.Struct) and cls not in (codec.Message, msgspec.Struct, status.Snapshot)
    }


def told_fields(text: str) -> dict[str, str]:
    """Field to type, from the paragraph of code spans that a message's text begins with."""
    first = text.strip().split("\n\n")[0]
    if first == "No fields.":
        return {}
    spans = re.findall(r"`([^`]+)`", first)
    assert re.sub(r"`[^`]+`", "", first).replace(",", "").strip() == "", f"no list of fields: {first}"
    return dict(span.split(": ", 1) for span in spans)


def real_fields(cls: type[msgspec.Struct]) -> dict[str, str]:
    return {
        field.name + ("" if field.required else "?"): cls.__annotations__[field.name]
        for field in msgspec.structs.fields(cls)
    }


SECTION_TEXTS = chapters(PAGE, 2)
TOLD = {
    name: text for section in [*SECTIONS, PARTS] for name, text in chapters(SECTION_TEXTS[section], 3).items()
}


def test_no_message_is_missing_and_none_is_invented():
    assert set(TOLD) == set(structs())


@pytest.mark.parametrize("name", sorted(structs()))
def test_fields(name):
    assert told_fields(TOLD[name]) == real_fields(structs()[name])


def messages_of(section: str) -> tuple[type[codec.Message], ...]:
    return typing.get_args(SECTIONS[section]) or (SECTIONS[section],)


@pytest.mark.parametrize("section", SECTIONS)
def test_each_direction_has_its_messages(section):
    told = set(chapters(SECTION_TEXTS[section], 3))
    real = {cls.__name__ for cls in messages_of(section)}
    if section.startswith("Lane: ") and section != "Lane: both ways":
        real -= {cls.__name__ for cls in messages_of("Lane: both ways")}
    assert told == real


@pytest.mark.parametrize("name", sorted(TOLD))
def test_each_says_more_than_its_fields(name):
    assert len(TOLD[name].strip().split("\n\n")) >= 2


def test_version():
    assert f"Version **{codec.PROTOCOL_VERSION}**" in PAGE


def test_sequences_name_real_messages():
    for line in re.findall(r"^ +\w-(?:-|)>>\w: (.+)$", PAGE, flags=re.MULTILINE):
        for name in re.findall(r"\b[A-Z][a-z]+(?:[A-Z][a-z]+)*\b", re.sub(r"\(.*?\)", "", line)):
            assert name in structs(), line


@pytest.mark.parametrize(
    "title", ["Start-up", "A cold call", "A warm call", "A TTL runs out", "A crash during a call"]
)
def test_sequences_are_there(title):
    assert "mermaid" in chapters(SECTION_TEXTS["Sequences"], 3)[title]
