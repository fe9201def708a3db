"""Names of inputs and outputs: which are needed, which are known, and what is said of the others."""

from __future__ import annotations

import collections
import enum
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.contract.both import (
    CPU,
    IA,
    F,
    Fail,
    InvalidArgument,
    Make,
    equal,
    fixed,
    identity,
    model,
    node,
    ones,
    ortvalue,
    raised,
    scaled,
    tensor,
)

pytestmark = pytest.mark.slow

A, B = ones(2, 3), ones(1, 3)
SUM, PRODUCT = np.full((2, 3), 2, np.float32), np.full((2, 3), 4, np.float32)
PYBIND = "run(): incompatible function arguments. The following argument types are supported:"


def feed(**more: Any) -> dict[str, Any]:
    return {"a": A, "b": B, **more}


@pytest.mark.parametrize("outputs", [None, [], (), "", 0, {}], ids=repr)
def test_no_names_are_all_outputs(make: Make, outputs: Any) -> None:
    equal(make(fixed()).run(outputs, feed()), [SUM, PRODUCT])


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (["sum"], [SUM]),
        (("product",), [PRODUCT]),
        (["product", "sum"], [PRODUCT, SUM]),
        (["sum", "sum"], [SUM, SUM]),
        (["sum", "product", "sum"], [SUM, PRODUCT, SUM]),
        ({"sum"}, [SUM]),
        (collections.deque(["sum"]), [SUM]),
    ],
    ids=str,
)
def test_outputs_come_in_the_order_asked_for(make: Make, outputs: Any, expected: list) -> None:
    equal(make(fixed()).run(outputs, feed()), expected)


def test_names_may_come_from_a_generator(make: Make) -> None:
    equal(make(fixed()).run((name for name in ["product", "sum"]), feed()), [PRODUCT, SUM])


def test_names_may_be_a_numpy_array_of_one(make: Make) -> None:
    equal(make(fixed()).run(np.array(["sum"]), feed()), [SUM])


@pytest.mark.parametrize("name", ["Q", "a", "", "w", "SUM", "sum "])
def test_unknown_outputs(make: Make, name: str) -> None:
    session = make(fixed())
    phrase = f"{IA}Invalid output name:{name}"
    make.refuses(session, lambda s: s.run([name], feed()), InvalidArgument, phrase)
    make.refuses(session, lambda s: s.run(["sum", name], feed()), InvalidArgument, phrase)
    equal(session.run(["sum"], feed()), [SUM])


@pytest.mark.parametrize("outputs", ["sum", [1], 5, {"sum": 1}, [None], [["sum"]]], ids=repr)
def test_outputs_that_are_no_names(make: Make, outputs: Any) -> None:
    error = raised(make(fixed()).run, outputs, feed())
    assert type(error) is TypeError
    assert str(error).startswith(PYBIND)


class Equal:
    """Equal to the name of an output, and none."""

    def __hash__(self) -> int:
        return hash("sum")

    def __eq__(self, other: object) -> bool:
        return other == "sum"


class OfItsOwn(str):
    """Text all the same."""


NO_NAMES = {
    "text": lambda: "ab",
    "bytes": lambda: b"ab",
    "a dict": lambda: {"a": 1, "b": 2},
    "a view of a dict": lambda: types.MappingProxyType({"a": 1}),
    "an iterator": lambda: iter(["a", "b"]),
    "None in it": lambda: ["a", None],
    "what equals a name": lambda: [Equal()],
    "a list of lists": lambda: [["a"]],
    "pairs": lambda: {"a": "b"}.items(),
    "numbers": lambda: [1, True],
    "bytearray": lambda: bytearray(b"a"),
    "no text": lambda: ["\udc80"],
    "an object": object,
    "True": lambda: True,
    "a number": lambda: 1.5,
    "an array of no dimension": lambda: np.array("a"),
}


def twins() -> bytes:
    """x to a and b, which are equal, so that names that are letters can be told from a text of them."""
    nodes = [node("Identity", ["x"], [name]) for name in "ab"]
    return model(nodes, [tensor("x")], [tensor("a"), tensor("b")])


def test_names_that_are_refused_after_equal_ones_were_taken(make: Make) -> None:
    """A call that repeats is known by its names: these equal others, or are made of the same letters."""
    session, x = make(twins()), {"x": ones(2)}
    for _ in range(3):
        for names in (["a", "b"], ["a"], None):
            session.run(names, x)
    for what, given in NO_NAMES.items():
        error = raised(session.run, given(), x)
        assert type(error) is TypeError, what
        assert str(error).startswith(PYBIND) or str(error) == "len() of unsized object", what
    equal(session.run(["a", "b"], x), [ones(2)] * 2)


def test_names_in_everything_that_is_a_list_to_onnxruntime(make: Make) -> None:
    session, x = make(twins()), {"x": ones(2)}
    many: list[Any] = [
        ("a", "b"),
        (name for name in "ab"),
        map(str, "ab"),
        {"a": 1, "b": 2}.keys(),
        {1: "a", 2: "b"}.values(),
        [b"a", "b"],
        [bytearray(b"a"), np.str_("b")],
        [OfItsOwn("a"), np.bytes_(b"b")],
        collections.UserList("ab"),
        collections.UserDict(a=1, b=2),
        [*np.array(["a", "b"])],
    ]
    for names in many:
        equal(session.run(names, x), [ones(2)] * 2)
    for names in (set("a"), frozenset("a"), np.array(["a"]), np.array(["a"], object), {"a": 1}.keys()):
        equal(session.run(names, x), [ones(2)])
    for names in (np.bool_(False), set(), b"", range(0)):
        equal(session.run(names, x), [ones(2)] * 2)
    for array in (np.array(["a", "b"]), np.array([])):
        assert type(raised(session.run, array, x)) is ValueError, "numpy says that its truth is ambiguous"


def test_names_for_ortvalues(make: Make) -> None:
    session, x = make(twins()), {"x": ortvalue(ones(2))}
    for given in (lambda: "ab", lambda: {"a": 1}, lambda: 1, lambda: [["a"]], lambda: ["\udc80"]):
        error = raised(session.run_with_ort_values, given(), x)
        assert type(error) is TypeError
        assert "incompatible function arguments" in str(error)
    assert len(session.run_with_ort_values((name for name in "ab"), x)) == 2


MISSING: dict[str, tuple[dict, str]] = {
    "one": ({"a": A}, "Required inputs (['b']) are missing from input feed (['a'])."),
    "all": ({}, "Required inputs (['a', 'b']) are missing from input feed ([])."),
    "other": (
        {"a": A, "Z": B, 3: B},
        "Required inputs (['b']) are missing from input feed (['a', 'Z', 3]).",
    ),
    "order": ({"w": A, "b": B}, "Required inputs (['a']) are missing from input feed (['w', 'b'])."),
}


@pytest.mark.parametrize("what", MISSING)
def test_missing_inputs(make: Make, what: str) -> None:
    given, message = MISSING[what]
    session = make(fixed())
    make.refuses(session, lambda s: s.run(None, given), ValueError, message)
    assert str(raised(session.run, ["Q"], given)) == message  # looked at before the outputs are


@pytest.mark.parametrize("name", ["Z", "sum", "", "A"])
def test_inputs_too_many(make: Make, name: str) -> None:
    session = make(fixed())
    phrase = f"{IA}Invalid input name: {name}"
    make.refuses(session, lambda s: s.run(None, feed(**{name: A})), InvalidArgument, phrase)
    make.refuses(session, lambda s: s.run(["Q"], feed(**{name: A})), InvalidArgument, phrase)


def test_a_constant_initializer_cannot_be_fed(make: Make) -> None:
    session, two = make(scaled()), np.array(3, np.float32)
    phrase = f"{IA}Invalid input name: two"
    make.refuses(session, lambda s: s.run(None, {"x": ones(1, 1), "two": two}), InvalidArgument, phrase)


def test_an_initializer_that_is_an_input_may_be_overridden(make: Make) -> None:
    session = make(fixed())
    equal(session.run(["product"], feed(w=np.zeros(3, np.float32))), [PRODUCT * 0])
    equal(session.run(["product"], feed()), [PRODUCT])
    phrase = IA + "Got invalid dimensions for input: w for the following indices\n index: 0 Got: 4 "
    make.refuses(session, lambda s: s.run(None, feed(w=ones(4))), InvalidArgument, phrase)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "'NoneType' object has no attribute 'keys'"),
        ([A, B], "'list' object has no attribute 'keys'"),
        ("ab", "'str' object has no attribute 'keys'"),
        (A, "'numpy.ndarray' object has no attribute 'keys'"),
    ],
    ids=["None", "list", "str", "array"],
)
def test_feeds_that_are_no_dicts(make: Make, given: Any, message: str) -> None:
    make.refuses(make(fixed()), lambda s: s.run(None, given), AttributeError, message)


@pytest.mark.parametrize("key", [3, None, ("a",)], ids=repr)
def test_keys_that_are_no_names(make: Make, key: Any) -> None:
    error = raised(make(fixed()).run, None, {**feed(), key: A})
    assert type(error) is TypeError
    assert str(error).startswith(PYBIND)


def test_names_may_be_bytes(make: Make) -> None:
    equal(make(identity()).run([b"y"], {"x": A, b"x": A}), [A])


@pytest.mark.parametrize(
    "mapping", [collections.OrderedDict, types.MappingProxyType, collections.UserDict, collections.ChainMap]
)
def test_feeds_may_be_any_mapping(make: Make, mapping: Any) -> None:
    equal(make(fixed()).run(None, mapping(feed())), [SUM, PRODUCT])


def test_the_order_of_a_feed_does_not_matter(make: Make) -> None:
    session = make(fixed())
    equal(session.run(["sum"], {"b": B * 5, "a": A}), [SUM * 3])
    bad = {"a": np.ones((2, 3)), "b": ones(1, 4)}
    for given in (bad, dict(reversed(bad.items()))):
        found = str(raised(session.run, None, given))
        assert found in [
            str(raised(make.twin(session).run, None, given)),
            IA + "Unexpected input data type. Actual: (tensor(double)) , expected: (tensor(float))",
        ]


def test_an_input_of_none(make: Make) -> None:
    make.refuses(make(fixed()), lambda s: s.run(None, feed(b=None)), Fail, "Missing Input: b")


def test_values_that_fit_the_model_but_not_each_other(make: Make) -> None:
    phrase = "Attempting to broadcast an axis by a dimension other than 1. 2 by 3"
    session = make(fixed())
    make.refuses(session, lambda s: s.run(None, feed(b=ones(3, 3))), Fail, phrase)
    equal(session.run(["sum"], feed()), [SUM])


@pytest.mark.parametrize(
    "options", [5, {}, onnxruntime.SessionOptions(), "text"], ids=lambda o: type(o).__name__
)
def test_run_options_that_are_none(make: Make, options: Any) -> None:
    error = raised(make(fixed()).run, None, feed(), options)
    assert type(error) is TypeError
    assert str(error).startswith(PYBIND)


def test_arguments_by_name(make: Make) -> None:
    session = make(fixed())
    equal(session.run(output_names=["sum"], input_feed=feed(), run_options=None), [SUM])
    equal(session.run(["sum"], feed(), onnxruntime.RunOptions()), [SUM])
    error = raised(session.run)
    assert type(error) is TypeError
    assert "run() missing 2 required positional arguments: 'output_names' and 'input_feed'" in str(error)


def test_a_model_without_inputs(make: Make) -> None:
    constant = node("Constant", [], ["y"], value_floats=[1.0, 2.0])
    session = make(model([constant], [], [tensor("y", F, [2])]))
    equal(session.run(None, {}), [np.array([1, 2], np.float32)])
    make.refuses(session, lambda s: s.run(None, {"x": A}), InvalidArgument, f"{IA}Invalid input name: x")


def test_names_that_are_odd(make: Make) -> None:
    nodes = [node("Neg", ["eingang/ä:0"], [" out put "])]
    session = make(model(nodes, [tensor("eingang/ä:0", F, [1])], [tensor(" out put ", F, [1])]))
    equal(session.run([" out put "], {"eingang/ä:0": ones(1)}), [-ones(1)])
    assert [i.name for i in session.get_inputs()] == ["eingang/ä:0"]


def test_many_calls_of_many_names(make: Make) -> None:
    """What is remembered from a call must not leak into the next."""
    session = make(fixed())
    for i in range(1, 5):
        equal(session.run(["sum"], {"a": A * i, "b": B}), [(A * i + B)])
        equal(session.run(["product", "sum"], {"b": B * i, "a": A}), [(A + B * i) * 2, A + B * i])
        assert type(raised(session.run, ["nope"], feed())) is InvalidArgument
    plain = make(identity())
    equal(plain.run(None, {"x": A[0]}), [A[0]])
    equal(plain.run(None, {"x": A}), [A])


class Name(enum.StrEnum):
    A = "a"
    SUM = "sum"


class Text(str, enum.Enum):  # noqa: UP042  # what a program of before 3.11 has
    A = "a"
    SUM = "sum"


@pytest.mark.parametrize("a", [Name.A, Text.A, np.str_("a")], ids=repr)
@pytest.mark.parametrize("total", [Name.SUM, Text.SUM, np.str_("sum")], ids=repr)
def test_names_of_a_subclass_of_str(make: Make, a: str, total: str) -> None:
    given = {a if name == "a" else name: value for name, value in feed().items()}
    equal(make(fixed()).run([total], given), [A + B])


def test_paths_and_providers_of_a_subclass_of_str(make: Make, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(fixed())
    session = make(
        np.str_(tmp_path / "m.onnx"),
        providers=[(np.str_("CPUExecutionProvider"), {"n": np.int64(1), "p": tmp_path})],
    )
    assert session.get_providers() == CPU
