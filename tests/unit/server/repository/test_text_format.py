"""Protobuf's text format: what is read, what is refused with which line, and texts of any content."""

from __future__ import annotations

import contextlib
import random
import time

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf import text_format as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_dl.server.repository import schema, text_format
from onnx_dl.server.repository.text_format import Malformed, Node, Value, Word

CONFIG = """
# A comment: "quotes" { and braces
name: "simple"
platform: 'onnxruntime_onnx'
max_batch_size: 8  # behind a value
input [
  { name: "INPUT0" data_type: TYPE_INT32 dims: [ 16 ] },
  { name: "INPUT1", data_type: TYPE_INT32; dims: 1 dims: -1 }
]
output < name: "OUT" 'PUT0' data_type: 8 dims: [ 0x10, 020 ] >
version_policy: { specific { versions: [1, 3] } }
parameters { key: "onnx_dl.ttl" value: { string_value: "5m" } }
parameters: [ { key: "b" value { string_value: "\\x41\\102\\n\\u00e9\\"" } } ]
instance_group [ { kind: KIND_CPU count: 1 } ]
dynamic_batching { }
optimization { execution_accelerators { gpu_execution_accelerator: [ { name: "cuda" } ] } }
"""


def test_a_configuration_as_data() -> None:
    lines: dict[schema.Path, int] = {}
    found = schema.of_tree(text_format.parse(CONFIG), lines)
    assert found == {
        "name": "simple",
        "platform": "onnxruntime_onnx",
        "max_batch_size": 8,
        "input": [
            {"name": "INPUT0", "data_type": "TYPE_INT32", "dims": [16]},
            {"name": "INPUT1", "data_type": "TYPE_INT32", "dims": [1, -1]},
        ],
        "output": [{"name": "OUTPUT0", "data_type": "TYPE_INT32", "dims": [16, 16]}],
        "version_policy": {"specific": {"versions": [1, 3]}},
        "parameters": {"onnx_dl.ttl": {"string_value": "5m"}, "b": {"string_value": 'AB\né"'}},
        "instance_group": [{"kind": "KIND_CPU", "count": 1}],
        "dynamic_batching": {},
        "optimization": {"execution_accelerators": {"gpu_execution_accelerator": [{"name": "cuda"}]}},
    }
    assert lines["max_batch_size",] == 5
    assert lines["input", 1] == 8
    assert lines["input", 1, "dims"] == 8
    assert lines["parameters", "b"] == 13


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb", 2, "':' or '{' was expected after b"),
        ("a {\n b: 1\n", 3, "'}' is missing for the message of line 1"),
        ("a <\n b: 1 }", 2, "a field's name was expected, not '}'"),
        ("a: [1, 2\nb: 3", 2, "',' or ']' was expected, not 'b'"),
        ("a: [1 2]", 1, "',' or ']' was expected, not '2'"),
        ("a: 'x\n'", 1, "no closing quote on its line"),
        ("\n\na: 1.2.3", 3, "'1.2.3' is not a number"),
        ("a: 12abc", 1, "'12abc' is not a number"),
        ("a: 0x", 1, "'0x' is not a number"),
        ("a: 089", 1, "'089' is not a number"),
        ("a: -'x'", 1, "a number was expected after '-'"),
        ("a: '\\q'", 1, "\\q is not an escape"),
        ("a: '\\xff'", 1, "this text is not UTF-8"),
        ("a: '\\UFFFFFFFF'", 1, "\\FFFFFFFF is not a character"),
        ("a: '\\ud800'", 1, "\\d800 is not a character"),
        ("a: @", 1, "'@' has no meaning here"),
        ("a:", 1, "a value was expected, not the end of the text"),
        ("a: ;", 1, "a value was expected, not ';'"),
        ("[xy]: 1", 1, "extensions are not known"),
        (": 1", 1, "a field's name was expected"),
        ("a [1]", 1, "':' is missing after a"),
        ("a {" * 40, 1, "more than 24 levels deep"),
        ("a: " + "9" * 100, 1, "is not a number of 64 bits"),
    ],
)
def test_what_is_refused_has_a_line(text: str, line: int, words: str) -> None:
    with pytest.raises(Malformed) as raised:
        text_format.parse(text)
    assert raised.value.line == line
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("\nmax_batch_sise: 1", 2, "max_batch_sise is not a field here. Did you mean max_batch_size?"),
        ("name: 1", 1, "name takes text in quotes, not 1"),
        ("name: simple", 1, "name takes text in quotes, not simple"),
        ("name: 'a'\nname: 'b'", 2, "name is given twice"),
        ("max_batch_size: 2147483648", 1, "max_batch_size takes a whole number from"),
        ("max_batch_size: 1.0", 1, "max_batch_size takes a whole number from"),
        ("max_batch_size: 'x'", 1, "not 'x'"),
        ("max_batch_size { }", 1, "max_batch_size takes a whole number from -2147483648 to 2147483647"),
        ("input: 1", 1, "input takes a message"),
        ("input {\n data_type: TYPE_FP23 }", 2, "Did you mean TYPE_FP32?"),
        ("input { data_type: 99 }", 1, "data_type takes one of TYPE_INVALID"),
        ("input { optional: 2 }", 1, "optional takes true or false"),
        ("parameters: 'x'", 1, "parameters takes entries such as"),
        ("parameters { kay: 'x' }", 1, "Did you mean key?"),
        ("parameters { key: 'x' key: 'y' }", 1, "key is given twice"),
        ("dynamic_batching {}\nsequence_batching {}", 2, "exclude each other"),
        (
            "version_policy { all {} latest {} }",
            1,
            "latest and all exclude each other",
        ),
    ],
)
def test_fields_and_values_are_checked(text: str, line: int, words: str) -> None:
    with pytest.raises(Malformed) as raised:
        schema.of_tree(text_format.parse(text), {})
    assert raised.value.line == line
    assert words in str(raised.value)


def test_json_as_protobuf_reads_it() -> None:
    found = schema.of_json(
        {
            "maxBatchSize": "16",
            "input": [{"name": "x", "dataType": 11, "dims": ["-1", 3, 4.0]}],
            "parameters": {"a": {"string_value": "b"}},
            "backend": None,
            "version_policy": {"all": {}},
        }
    )
    assert found == {
        "max_batch_size": 16,
        "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1, 3, 4]}],
        "parameters": {"a": {"string_value": "b"}},
        "version_policy": {"all": {}},
    }


@pytest.mark.parametrize(
    "value",
    [
        [], "x", 1, None, {"max_batch_size": True}, {"max_batch_size": 1.5}, {"max_batch_size": "1e3"},
        {"max_batch_size": "9" * 5000}, {"max_batch_size": 1, "maxBatchSize": 1},
        {"input": {}}, {"input": [1]},
        {"input": [{"dims": 1}]}, {"parameters": []}, {"name": 1}, {"unknown": 1}, {"": 1},
        {"dynamic_batching": {}, "ensemble_scheduling": {}}, {"max_batch_size": "\u0661"},
    ],
)  # fmt: skip
def test_json_of_wrong_types_is_refused(value: object) -> None:
    if value == {"max_batch_size": "\u0661"}:  # Python reads other scripts' digits, too: it is the number 1
        assert schema.of_json(value) == {"max_batch_size": 1}
        return
    with pytest.raises(Malformed):
        schema.of_json(value)


def test_every_type_that_a_message_names_is_there() -> None:
    scalars = {"string", "bool", "int32", "int64", "uint32", "uint64", "float", "double"}
    for name, fields in schema.MESSAGES.items():
        for kind in fields.values():
            for part in kind.removesuffix("*").removeprefix("map:").split(":"):
                assert part in scalars or part in schema.MESSAGES or part in schema.ENUMS, (name, kind)
    for name, choices in schema.CHOICES.items():
        assert {each for choice in choices for each in choice} <= schema.MESSAGES[name].keys()


# --- any content ------------------------------------------------------------------------------------------

PIECES = (
    "a", "name", "input", "{", "}", "<", ">", "[", "]", ":", ",", ";", "-", '"x"', "'y'", "1", "-2", "0x1f",
    "017", "1.5e3", "true", "TYPE_FP32", "#c\n", "\n", " ", '"', "'", "\\", "\\n", "\x00", "é", "dims",
    "\ud800",
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=60).map("".join) | st.text(max_size=80))
def test_no_text_raises_anything_else(text: str) -> None:
    try:
        schema.of_tree(text_format.parse(text), {})
    except Malformed as error:
        assert 0 <= error.line <= text.count("\n") + 1
        assert str(error)


def test_damaged_configurations_raise_nothing_else() -> None:
    rng = random.Random(18)
    for _ in range(1000):
        text = list(CONFIG)
        for _ in range(rng.randint(1, 8)):
            at = rng.randrange(len(text))
            text[at : at + rng.randint(0, 3)] = rng.choice(PIECES)
        try:
            schema.of_tree(text_format.parse("".join(text)), {})
        except Malformed as error:
            assert error.line >= 0


@pytest.mark.parametrize(
    "piece", ["{", "a{", "a:[", "#", '"', "\\", "-", "a:1 ", "a:'x' 'y' ", "[a", "9", ".", "\n"]
)
def test_the_time_is_bounded_by_the_length(piece: str) -> None:
    text = piece * (50_000 // len(piece))
    began = time.thread_time()  # which does not pass while others have the processors
    with contextlib.suppress(Malformed):
        text_format.parse(text)
    assert time.thread_time() - began < 2


def test_a_text_that_is_too_long_is_refused() -> None:
    with pytest.raises(Malformed, match="more than 1048576 characters"):
        text_format.parse("#" * (text_format.LONGEST + 1))


# --- compared with protobuf's own parser ------------------------------------------------------------------

_NAMES = st.sampled_from(["name", "package", "dependency", "public_dependency", "message_type", "options"])


@st.composite
def messages(draw: st.DrawFn) -> descriptor_pb2.FileDescriptorProto:
    """A message with text, numbers, enums, bools and messages in each other, repeated or not."""
    made = descriptor_pb2.FileDescriptorProto()
    made.name = draw(st.text(max_size=12))
    made.dependency.extend(draw(st.lists(st.text(max_size=5), max_size=3)))
    made.public_dependency.extend(draw(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4)))
    for _ in range(draw(st.integers(0, 2))):
        message = made.message_type.add(name=draw(st.text(max_size=5)))
        message.field.add(number=draw(st.integers(0, 100)), type=draw(st.sampled_from([1, 9, 11])))
        message.options.deprecated = draw(st.booleans())
    return made


@settings(max_examples=150, deadline=None)
@given(messages(), st.booleans(), st.booleans(), st.booleans())
def test_what_protobuf_writes_is_read_as_it_was(
    message: descriptor_pb2.FileDescriptorProto, one_line: bool, pointy: bool, short: bool
) -> None:
    text = reference.MessageToString(
        message, as_one_line=one_line, pointy_brackets=pointy, use_short_repeated_primitives=short
    )
    assert plain(text_format.parse(text)) == expected(message)


def plain(nodes: list[Node]) -> dict[str, list[object]]:
    found: dict[str, list[object]] = {}
    for node in nodes:
        found.setdefault(node.name, []).append(value_of(node.value))
    return found


def value_of(value: Value) -> object:
    if isinstance(value, list):
        return plain(value)
    return {"true": True, "false": False}.get(value, value) if isinstance(value, Word) else value


def expected(message: object) -> dict[str, list[object]]:
    found: dict[str, list[object]] = {}
    for field, value in message.ListFields():  # type: ignore[attr-defined]
        values = value if field.is_repeated else [value]
        found[field.name] = [one(field, each) for each in values]
    return found


def one(field: object, value: object) -> object:
    if field.message_type is not None:  # type: ignore[attr-defined]
        return expected(value)
    if field.enum_type is not None:  # type: ignore[attr-defined]
        return field.enum_type.values_by_number[value].name  # type: ignore[attr-defined]
    return value
