"""Exceptions over the wire: the same class, the same message, and no class of a peer's choice."""

from __future__ import annotations

import builtins
import concurrent.futures
import inspect
import json
import os

import pytest

from onnx_dl import errors
from onnx_dl.errors import BY_CODE, OnnxDLError, RemoteError, WorkerDied
from onnx_dl.protocol import codec, failures, lane


def travel(error: BaseException, **details) -> Exception:
    raw = codec.encode(lane.CallFailed(failure=failures.describe(error, **details)))
    return failures.rebuild(lane.lane_reply(raw).failure)


def peer(family: str, name: str, args: list, details: dict | None = None) -> Exception:
    """What a peer that says this makes us raise."""
    said = failures.Failure(
        family=family, name=name, args=args, details=details or {}, traceback="its traceback"
    )
    return failures.rebuild(lane.lane_reply(codec.encode(lane.CallFailed(failure=said))).failure)


# --- ours ------------------------------------------------------------------------------------------------


def test_every_class_has_a_code_of_its_own():
    def tree(cls: type) -> list[type]:
        return [cls, *(found for sub in cls.__subclasses__() for found in tree(sub))]

    classes = tree(OnnxDLError)
    assert {cls.code for cls in classes} == set(BY_CODE)
    assert len(BY_CODE) == len(set(classes))
    named = {cls for cls in vars(errors).values() if inspect.isclass(cls) and issubclass(cls, OnnxDLError)}
    assert set(classes) == named


@pytest.mark.parametrize("cls", BY_CODE.values(), ids=lambda cls: cls.__name__)
def test_every_class_of_ours(cls):
    got = travel(cls("what to do"))
    assert type(got) is cls
    assert str(got) == "what to do"
    assert isinstance(got, cls.__mro__[1])


def test_attributes_survive():
    sent = WorkerDied(
        "gone", pid=7, exit_code=None, signal=11, stderr="a\nb", reason="request", retry_after=2.5
    )
    got = travel(sent)
    assert type(got) is WorkerDied
    assert vars(got) == vars(sent)
    got = travel(RemoteError("m", type_name="pkg.Odd", traceback="t"))
    assert (got.type_name, got.traceback) == ("pkg.Odd", "t")
    large = travel(errors.MemoryLimitExceeded("much", limit=5, used=7, pid=9, exit_code=75))
    assert (large.limit, large.used, large.pid, large.exit_code) == (5, 7, 9, 75)
    assert travel(errors.LoadTimeout("slow", retry_after=4.0)).retry_after == 4.0


def test_details_are_set_on_whatever_is_raised():
    assert travel(ValueError("x"), retry_after=3.0).retry_after == 3.0
    assert travel(WorkerDied("x", retry_after=1.0), retry_after=3.0).retry_after == 3.0


def test_ours_is_never_a_bare_exception():
    for cls in BY_CODE.values():
        assert cls is OnnxDLError or cls.__mro__[1] is not Exception


# --- Python's --------------------------------------------------------------------------------------------

BUILTIN = [
    ValueError("plain"),
    ValueError(),
    ValueError("two", 2),
    TypeError("Zürich"),
    KeyError("name"),
    KeyError(3),
    IndexError("list index out of range"),
    RuntimeError("multi\nline"),
    NotImplementedError("no"),
    MemoryError("much"),
    OverflowError("int too large"),
    ZeroDivisionError("division by zero"),
    AttributeError("no such method"),
    StopIteration(5),
    OSError("text only"),
    OSError(5, "Input/output error"),
    FileNotFoundError(2, "No such file or directory"),
    FileNotFoundError(2, "No such file or directory", "/gone/m.onnx"),
    FileExistsError(17, "File exists", "a", None, "b"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    TimeoutError("late"),
    ImportError("no module"),
    RecursionError("deep"),
    UserWarning("as an error"),
]


@pytest.mark.parametrize("error", BUILTIN, ids=repr)
def test_builtin(error):
    got = travel(error)
    assert type(got) is type(error)
    assert str(got) == str(error)
    assert got.args == error.args


@pytest.mark.parametrize("error", [SyntaxError("x"), ExceptionGroup("g", [ValueError("x")])], ids=repr)
def test_odd_builtins_arrive_as_something_that_tells(error):
    got = travel(error)
    assert isinstance(got, type(error) | RemoteError)
    assert ("x" if isinstance(error, SyntaxError) else "g") in str(got)


def test_arguments_that_cannot_travel_become_text():
    got = travel(ValueError({1, 2}, object))
    assert type(got) is ValueError
    assert str(got) == str(ValueError({1, 2}, object))


def test_text_that_is_not_unicode_can_still_be_sent():
    """File names may hold it; a failure that cannot be sent would leave its caller waiting."""
    got = travel(ValueError("m\udcff.onnx"))
    assert type(got) is ValueError
    assert "m" in str(got) and ".onnx" in str(got)
    assert isinstance(travel(Odd("m\udcff.onnx")), RemoteError)


# --- onnxruntime's ---------------------------------------------------------------------------------------


def state():
    pytest.importorskip("onnxruntime")
    from onnxruntime.capi import onnxruntime_pybind11_state

    return onnxruntime_pybind11_state


def classes_of_onnxruntime() -> list[str]:
    module = state()
    return sorted(
        name for name, cls in vars(module).items() if inspect.isclass(cls) and issubclass(cls, Exception)
    )


def test_every_class_of_onnxruntime():
    module, names = state(), classes_of_onnxruntime()
    assert {"InvalidArgument", "NoSuchFile", "InvalidProtobuf", "Fail", "InvalidGraph"} <= set(names)
    for name in names:
        cls = getattr(module, name)
        got = travel(cls(f"[ONNXRuntimeError] : 2 : {name} : why"), retry_after=1.0)
        assert type(got) is cls
        assert str(got) == f"[ONNXRuntimeError] : 2 : {name} : why"
        assert got.retry_after == 1.0


# --- all others ------------------------------------------------------------------------------------------


class Odd(Exception):
    pass


class ValueErrorOfOurOwn(ValueError):
    pass


ValueErrorOfOurOwn.__name__ = "ValueError"  # a namesake is not the builtin


def test_unknown_class_is_a_remote_error_with_its_traceback():
    try:
        raise Odd("broken")
    except Odd as error:
        got = travel(error)
    assert type(got) is RemoteError
    assert got.type_name == f"{__name__}.Odd"
    assert str(got) == f"{__name__}.Odd: broken"
    assert "Traceback" in got.traceback and 'raise Odd("broken")' in got.traceback


@pytest.mark.parametrize(
    "error",
    [ValueErrorOfOurOwn("x"), json.JSONDecodeError("x", "doc", 0), concurrent.futures.BrokenExecutor("x")],
    ids=["namesake", "JSONDecodeError", "BrokenExecutor"],
)
def test_other_classes_are_remote_errors(error):
    assert type(travel(error)) is RemoteError


@pytest.mark.parametrize("cls", [SystemExit, KeyboardInterrupt, GeneratorExit, BaseException])
def test_what_would_end_the_caller_is_a_remote_error(cls):
    got = travel(cls("bye"))
    assert type(got) is RemoteError
    assert "bye" in str(got)


NOT_EXCEPTIONS = ["SystemExit", "KeyboardInterrupt", "GeneratorExit", "BaseException", "eval", "exec", "open"]


@pytest.mark.parametrize(
    "name", [*NOT_EXCEPTIONS, "print", "__import__", "type", "int", "os.system", "", "__doc__"]
)
@pytest.mark.parametrize("family", ["builtin", "onnxruntime", "onnx_dl", "other", "nonsense", "os", ""])
def test_peer_cannot_name_a_class_of_its_choice(family, name, capsys):
    got = peer(family, name, ["echo hacked"])
    assert type(got) is RemoteError
    assert got.type_name == name
    assert got.traceback == "its traceback"
    assert capsys.readouterr().out == ""


def test_peer_cannot_reach_functions_of_the_system(monkeypatch):
    called = []
    monkeypatch.setattr(os, "system", called.append)
    for family, name in (("os", "system"), ("builtin", "os.system"), ("onnxruntime", "os.system")):
        assert type(peer(family, name, ["true"])) is RemoteError
    assert not called


@pytest.mark.parametrize(
    ("family", "name", "args"),
    [
        ("onnx_dl", "worker-died", []),
        ("onnx_dl", "worker-died", [1] * 20),
        ("onnx_dl", "remote", []),
        ("builtin", "UnicodeDecodeError", ["too few"]),
        ("builtin", "ExceptionGroup", ["no exceptions", []]),
        ("builtin", "UnicodeDecodeError", [[], {}, 0, 1, 2]),
    ],
)
def test_arguments_that_the_class_refuses_make_no_other_error(family, name, args):
    assert isinstance(peer(family, name, args), OnnxDLError | getattr(builtins, name, OnnxDLError))


@pytest.mark.parametrize(
    "details",
    [
        {"__class__": 1},
        {"args": 5},
        {"__traceback__": "x"},
        {"__dict__": 1},
        {"__cause__": "x"},
        {"with_traceback": 1},
    ],
    ids=lambda d: next(iter(d)),
)
@pytest.mark.parametrize(
    ("family", "name"), [("builtin", "ValueError"), ("onnx_dl", "worker-died"), ("other", "x")]
)
def test_details_cannot_break_the_exception(family, name, details):
    got = peer(family, name, ["text"], details)
    assert isinstance(got, Exception)
    assert "text" in str(got)
    assert callable(got.with_traceback)
