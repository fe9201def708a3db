"""The constructor: sources, providers and keywords, and what is warned of, printed and raised.

The proxy of this suite loads in its constructor (``eager=True``), as onnxruntime does.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from tests.contract.both import (
    CPU,
    FAIL,
    IA,
    C,
    F,
    Fail,
    InvalidArgument,
    Make,
    identity,
    model,
    node,
    ones,
    plain,
    raised,
    scaled,
    tensor,
)

pytestmark = pytest.mark.slow

GOOD = scaled()
PREFIX = "[ONNXRuntimeError] : "


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with models in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ORT_LOAD_CONFIG_FROM_MODEL", raising=False)
    (tmp_path / "sub").mkdir()
    for name, content in {
        "good": GOOD,
        "garbage": b"no model",
        "empty": b"",
        "unknown": unknown(),
        "opset": identity(opset=99),
        "sub/good": GOOD,
        "ä b": GOOD,
    }.items():
        (tmp_path / f"{name}.onnx").write_bytes(content)
    return tmp_path


def unknown() -> bytes:
    return model([node("Nope", ["x"], ["y"])], [tensor("x")], [tensor("y")])


def without_kernel() -> bytes:
    d = TensorProto.DOUBLE
    return model([node("Erf", ["x"], ["y"])], [tensor("x", d)], [tensor("y", d)])


def works(session: Any) -> None:
    assert session.get_providers() == CPU
    assert session.run(["twice"], {"x": ones(1, 1)})[0].tolist() == [[2]]


def refuses(make: Make, error: type, phrase: str, *args: Any, **kw: Any) -> None:
    """Both classes refuse these arguments with the same class and message."""
    found = raised(lambda: make.cls(*args, **kw))
    assert type(found) is error, repr(found)
    assert phrase in str(found)
    real = raised(lambda: onnxruntime.InferenceSession(*args, **kw))
    assert plain(found) == plain(real)


# --- the source --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [GOOD, "good.onnx", Path("good.onnx"), "./sub/../good.onnx", "sub/good.onnx", "ä b.onnx"],
    ids=lambda s: "bytes" if isinstance(s, bytes) else str(s),
)
def test_sources(make: Make, source: Any) -> None:
    works(make(source))
    works(make(os.path.abspath(source) if isinstance(source, str) else source))


def test_a_path_like_of_ones_own(make: Make) -> None:
    class Mine:
        def __fspath__(self) -> str:
            return "good.onnx"

    works(make(Mine()))


NO_SUCH = "3 : NO_SUCHFILE : Load model from {0} failed:Load model {0} failed. File doesn't exist"
SOURCES: dict[str, tuple[Any, type, str]] = {
    "missing": ("nope.onnx", C.NoSuchFile, PREFIX + NO_SUCH.format("nope.onnx")),
    "missing Path": (Path("x/y.onnx"), C.NoSuchFile, PREFIX + NO_SUCH.format("x/y.onnx")),
    "garbage": (
        "garbage.onnx",
        C.InvalidProtobuf,
        PREFIX + "7 : INVALID_PROTOBUF : Load model from garbage.onnx failed:Protobuf parsing failed.",
    ),
    "garbage bytes": (
        b"no model",
        C.InvalidProtobuf,
        PREFIX + "7 : INVALID_PROTOBUF : Failed to load model because protobuf parsing failed.",
    ),
    "empty": (
        "empty.onnx",
        InvalidArgument,
        IA + "Load model from empty.onnx failed:No graph was found in the protobuf.",
    ),
    "empty bytes": (b"", InvalidArgument, IA + "No graph was found in the protobuf."),
    "folder": (
        "sub",
        C.InvalidProtobuf,
        PREFIX + "7 : INVALID_PROTOBUF : Load model from sub failed:Protobuf parsing failed.",
    ),
    "unknown op": (
        unknown(),
        C.InvalidGraph,
        PREFIX + "10 : INVALID_GRAPH : This is an invalid model. In Node, ",
    ),
    "unknown op in a file": (
        "unknown.onnx",
        C.InvalidGraph,
        PREFIX + "10 : INVALID_GRAPH : Load model from unknown.onnx failed:This is an invalid model.",
    ),
    "no kernel": (
        model(
            [node("Erf", ["x"], ["y"])], [tensor("x", TensorProto.DOUBLE)], [tensor("y", TensorProto.DOUBLE)]
        ),
        C.NotImplemented,
        PREFIX + "9 : NOT_IMPLEMENTED : Could not find an implementation for Erf(13) node with name ''",
    ),
    "opset": (identity(opset=99), Fail, "Opset 99 is under development and support for this is limited."),
    "opset in a file": ("opset.onnx", Fail, FAIL + "Load model from opset.onnx failed:"),
    "ir": (identity(ir=99), Fail, "Unsupported model IR version: 99, max supported IR version: "),
}
TYPES: dict[str, Any] = {
    "NoneType": None,
    "bytearray": bytearray(GOOD),
    "memoryview": memoryview(GOOD),
    "int": 3,
    "_io.BytesIO": io.BytesIO(GOOD),
    "onnx.onnx_ml_pb2.ModelProto": onnx.load_from_string(GOOD),
    "list": [GOOD],
}


@pytest.mark.parametrize("what", SOURCES)
def test_sources_that_are_refused(make: Make, what: str) -> None:
    source, error, phrase = SOURCES[what]
    refuses(make, error, phrase, source, providers=CPU)


@pytest.mark.parametrize("name", TYPES)
def test_sources_of_other_types(make: Make, name: str) -> None:
    refuses(make, TypeError, f"Unable to load from type '{type(TYPES[name])}'", TYPES[name], providers=CPU)
    assert name in str(type(TYPES[name]))


def test_an_empty_path(make: Make) -> None:
    error = raised(lambda: make.cls("", providers=CPU))
    assert type(error) is TypeError
    assert str(error).startswith("__init__(): incompatible constructor arguments.")


# --- arguments ---------------------------------------------------------------------------------------------


def test_forms_of_the_call(make: Make) -> None:
    works(make.cls(GOOD))
    works(make.cls(path_or_bytes=GOOD, sess_options=None, providers=None, provider_options=None))
    works(make.cls(GOOD, onnxruntime.SessionOptions(), CPU, [{}]))
    works(make.cls("good.onnx", None, CPU, None))
    works(make.cls(GOOD, providers=CPU, unknown=1, model_name="x"))


def test_no_source(make: Make) -> None:
    assert type(raised(make.cls)) is TypeError


@pytest.mark.parametrize(
    "given", [{}, {"a": 1}, 3, "text", onnxruntime.RunOptions()], ids=lambda o: type(o).__name__
)
def test_options_that_are_none(make: Make, given: Any) -> None:
    found = raised(lambda: make.cls(GOOD, sess_options=given, providers=CPU))
    assert type(found) is AttributeError
    assert str(found).endswith("object has no attribute 'has_providers'")
    assert str(found) == str(raised(lambda: onnxruntime.InferenceSession(GOOD, given, CPU)))


def test_empty_options_are_none_without_providers(make: Make) -> None:
    works(make.cls(GOOD, sess_options={}))


@pytest.mark.parametrize("value", [0, 1, True, False, "0", "1"], ids=repr)
def test_the_keyword_enable_fallback(make: Make, value: Any) -> None:
    session = make.cls(GOOD, providers=CPU, enable_fallback=value)
    works(session)
    assert session._enable_fallback == (int(value) == 1)


@pytest.mark.parametrize("name", ["enable_fallback", "read_config_from_model"])
def test_keywords_that_are_no_numbers(make: Make, name: str) -> None:
    phrase = "invalid literal for int() with base 10: 'x'"
    refuses(make, ValueError, phrase, GOOD, providers=CPU, **{name: "x"})


@pytest.mark.parametrize(
    "value", [None, set(), {"MatMulAddFusion"}, ["ConstantFolding", "Nobody"], ("A",), "abc"], ids=str
)
def test_disabled_optimizers(make: Make, value: Any) -> None:
    works(make.cls(GOOD, providers=CPU, disabled_optimizers=value))


def test_disabled_optimizers_are_disabled(make: Make, folder: Path) -> None:
    constants = [node("Constant", [], [name], value_float=2.0) for name in ("a", "b")]
    nodes = [*constants, node("Add", ["a", "b"], ["c"]), node("Mul", ["x", "c"], ["y"])]
    source = model(nodes, [tensor("x", F, [3])], [tensor("y", F, [3])])
    seen = {}
    for disabled in (None, ["ConstantFolding"]):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = "optimized.onnx"
        make.cls(source, options, providers=CPU, disabled_optimizers=disabled)
        seen[str(disabled)] = sorted(n.op_type for n in onnx.load(folder / "optimized.onnx").graph.node)
    assert seen == {"None": ["Mul"], "['ConstantFolding']": ["Add", "Mul"]}


def test_disabled_optimizers_that_are_refused(make: Make) -> None:
    phrase = "'int' object is not iterable"
    refuses(make, TypeError, phrase, GOOD, providers=CPU, disabled_optimizers=3)


# --- providers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "providers",
    [None, [], CPU, tuple(CPU), [("CPUExecutionProvider", {})], [("CPUExecutionProvider", {"a": 1})]],
    ids=str,
)
def test_providers(make: Make, providers: Any) -> None:
    works(make.cls(GOOD, providers=providers))
    works(make.cls(GOOD, providers=providers, enable_fallback=0))


@pytest.mark.parametrize("given", [None, [{}], ({},), [{"use_arena": 0}]], ids=str)
def test_provider_options(make: Make, given: Any) -> None:
    session = make.cls(GOOD, providers=CPU, provider_options=given)
    works(session)
    assert session.get_provider_options() == {"CPUExecutionProvider": {}}
    works(make.cls(GOOD, provider_options=given))


def block(message: str, providers: Any) -> str:
    return (
        "*************** EP Error ***************\n"
        f"EP Error {message} when using {providers}\n"
        "Falling back to ['CPUExecutionProvider'] and retrying.\n"
        "****************************************\n"
    )


VALUES = "'providers' values must be either strings or (string, dict) tuples."
SAME_LENGTH = "'providers' and 'provider_options' should be the same length if both are given."
BAD_PROVIDERS: dict[str, tuple[Any, Any, str]] = {
    "number": ([3], None, VALUES),
    "half a pair": ([("CPUExecutionProvider",)], None, VALUES),
    "list as pair": ([["CPUExecutionProvider", {}]], None, VALUES),
    "set": (set(CPU), None, "'providers' should be a sequence."),
    "dict": ({"CPUExecutionProvider": {}}, None, "'providers' should be a sequence."),
    "two options": (CPU, [{}, {}], SAME_LENGTH),
    "options of number": (CPU, [1], "'provider_options' values must be dicts."),
    "options no list": (CPU, 3, "'provider_options' should be a sequence."),
    "options twice": (
        [("CPUExecutionProvider", {})],
        [{}],
        "Only string values for 'providers' are supported if 'provider_options' is given.",
    ),
}


@pytest.mark.parametrize("what", BAD_PROVIDERS)
def test_bad_providers_are_printed(make: Make, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    providers, given, message = BAD_PROVIDERS[what]
    session = make.cls(GOOD, providers=providers, provider_options=given)
    assert capsys.readouterr().out == block(message, providers)
    works(session)
    assert not session._enable_fallback


@pytest.mark.parametrize("what", BAD_PROVIDERS)
def test_bad_providers_without_fallback(make: Make, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    providers, given, message = BAD_PROVIDERS[what]
    kw = {"providers": providers, "provider_options": given, "enable_fallback": 0}
    refuses(make, ValueError, message, GOOD, **kw)
    assert capsys.readouterr().out == ""


def warned(make: Make, providers: Any, **kw: Any) -> tuple[Any, list[str]]:
    """The session, or what was raised; and what was warned of."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            session = make.cls(GOOD, providers=providers, **kw)
        except Exception as error:
            session = error
    assert {warning.category for warning in seen} <= {UserWarning}
    return session, [str(warning.message) for warning in seen]


def absent(name: str) -> str:
    available = ", ".join(onnxruntime.get_available_providers())
    return (
        f"Specified provider '{name}' is not in available provider names.Available providers: '{available}'"
    )


@pytest.mark.parametrize("providers", [["Nope"], ["Nope", *CPU], [("Nope", {})]], ids=str)
def test_unknown_providers(make: Make, providers: Any, capsys: pytest.CaptureFixture[str]) -> None:
    session, messages = warned(make, providers)
    assert messages == [absent("Nope")]
    assert capsys.readouterr().out == block("Unknown Provider Type: Nope", providers)
    works(session)
    error, messages = warned(make, providers, enable_fallback=0)
    assert (type(error), str(error)) == (RuntimeError, "Unknown Provider Type: Nope")
    assert messages == [absent("Nope")]
    assert capsys.readouterr().out == ""


def test_providers_as_a_str(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    session, messages = warned(make, "ABA")
    duplicate = "Duplicate provider 'A' encountered, ignoring."
    assert messages == [absent("A"), absent("B"), absent("A"), duplicate]
    assert capsys.readouterr().out == block("Unknown Provider Type: A", "ABA")
    works(session)


def test_a_provider_twice(make: Make) -> None:
    session, messages = warned(make, CPU * 2)
    assert messages == ["Duplicate provider 'CPUExecutionProvider' encountered, ignoring."]
    works(session)


def test_providers_that_are_a_number(make: Make) -> None:
    refuses(make, TypeError, "'int' object is not iterable", GOOD, providers=3)


def test_a_bad_model_with_bad_providers(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """The model is looked at when the fallback loads it; C's exceptions start no fallback."""
    found = raised(lambda: make.cls("garbage.onnx", providers=[3]))
    assert type(found) is C.InvalidProtobuf
    assert str(found.__cause__) == VALUES
    assert capsys.readouterr().out == block(VALUES, [3])
    raised(lambda: make.cls("garbage.onnx", providers=CPU))
    assert capsys.readouterr().out == ""


# --- options in the model ----------------------------------------------------------------------------------


def with_config(config: Any) -> bytes:
    made = onnx.load_from_string(GOOD)
    config = config if isinstance(config, str) else json.dumps({"session_options": config})
    helper.set_model_props(made, {"ort_config": config})
    return made.SerializeToString()


CONFIG = {"inter_op_num_threads": 3, "intra_op_num_threads": 2, "execution_mode": 1}


def in_force(session: Any) -> tuple:
    found = session.get_session_options()
    return found.inter_op_num_threads, found.intra_op_num_threads, found.execution_mode.name


def test_options_in_the_model_are_ignored(make: Make) -> None:
    source = with_config(CONFIG)
    assert in_force(make(source)) == (0, 0, "ORT_SEQUENTIAL")
    assert in_force(make(source, read_config_from_model=0)) == (0, 0, "ORT_SEQUENTIAL")


def test_the_keyword_alone_does_not_read_them(make: Make) -> None:
    """It takes the variable of the environment, too."""
    session = make(with_config(CONFIG), read_config_from_model=1)
    assert in_force(session) == in_force(make.twin(session))


def test_options_in_the_model_are_read(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_LOAD_CONFIG_FROM_MODEL", "1")
    source = with_config(CONFIG)
    assert in_force(make(source)) == (3, 2, "ORT_PARALLEL")
    mine = onnxruntime.SessionOptions()
    mine.intra_op_num_threads = 5
    session = make(source, mine)
    assert in_force(session) == in_force(make.twin(session))
    assert mine.intra_op_num_threads == 5
    assert in_force(make(GOOD)) == (0, 0, "ORT_SEQUENTIAL")
    works(make(source))


def test_the_environment_is_read_in_the_constructor(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    source = with_config(CONFIG)
    before = make(source)
    monkeypatch.setenv("ORT_LOAD_CONFIG_FROM_MODEL", "1")
    during = make(source)
    monkeypatch.setenv("ORT_LOAD_CONFIG_FROM_MODEL", "0")
    after = make(source)
    assert [in_force(session)[0] for session in (before, during, after)] == [0, 3, 0]


@pytest.mark.parametrize(
    ("config", "phrase"),
    [
        ("{nope", "Json stored in the `ort_config` key cannot be parsed."),
        ({"intra_op_num_threads": "x"}, "intra_op_num_threads option in the model file must be an integer"),
    ],
    ids=["json", "value"],
)
def test_options_in_the_model_that_are_refused(
    make: Make, config: Any, phrase: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ORT_LOAD_CONFIG_FROM_MODEL", "1")
    refuses(make, RuntimeError, phrase, with_config(config), providers=CPU)
    assert capsys.readouterr().out.startswith("*************** EP Error ***************\nEP Error ")
    refuses(make, RuntimeError, phrase, with_config(config), providers=CPU, enable_fallback=0)
    assert capsys.readouterr().out == ""


def test_a_model_that_is_large(make: Make) -> None:
    size = 500_000
    weights = helper.make_tensor("w", F, [size], np.arange(size, dtype=np.float32).tobytes(), raw=True)
    nodes = [node("Add", ["x", "w"], ["y"])]
    (result,) = make(model(nodes, [tensor("x", F, [1])], [tensor("y", F, [size])], [weights])).run(
        None, {"x": ones(1)}
    )
    assert result[-1] == size
