"""Exceptions across processes: to data, and back to the same class with the same message.

Covers builtin exceptions, the exception classes of onnxruntime's C module, and our own.  Anything else
arrives as :class:`~onnx_dl.errors.RemoteError`.  No class is ever looked up outside these three places, so a
peer cannot name one of its choice.
"""

from __future__ import annotations

import builtins
import importlib
import traceback
from typing import Any

import msgspec

from onnx_dl.errors import BY_CODE, OnnxDLError, RemoteError

pass

_C = "onnxruntime.capi.onnxruntime_pybind11_state"


def describe(error: BaseException, **details: Any) -> Failure:
    """``error`` as data; ``details`` are attributes to set on it when it is raised again."""
    if remarks := getattr(error, "remarks", None):
        details = {"remarks": remarks} | details
    if notes := getattr(error, "__notes__", None):
        details = {"__notes__": [_text(note) for note in notes]} | details
    if error.__cause__ is not None:
        details = {"cause": msgspec.to_builtins(describe(error.__cause__))} | details
    if isinstance(error, OnnxDLError):
        details = error.details() | details
        return Failure(family="onnx_dl", name=error.code, args=[_text(error)], details=details)
    cls = type(error)
    if getattr(builtins, cls.__name__, None) is cls:
        return Failure(family="builtin", name=cls.__name__, args=_plain(error), details=details)
    if cls.__module__ == _C:
        return Failure(family="onnxruntime", name=cls.__name__, args=_plain(error), details=details)
    text = _text("".join(traceback.format_exception(error)))
    name = f"{cls.__module__}.{cls.__qualname__}"
    return Failure(family="other", name=name, args=[_text(error)], details=details, traceback=text)


def rebuild(failure: Failure) -> Exception:
    """The exception to raise; importing onnxruntime only if it is one of onnxruntime's."""
    error = _instance(failure)
    for name, value in failure.details.items():
        if name == "cause":
            error.__cause__ = _cause(value)
        elif not hasattr(type(error), name):  # a peer adds attributes, it does not replace what a class has
            setattr(error, name, value)
    return error


def _cause(value: Any) -> Exception:
    """What a peer says was the reason, which may be anything."""
    try:
        return rebuild(msgspec.convert(value, Failure))
    except (msgspec.ValidationError, RecursionError) as error:
        return RemoteError(f"The reason came as what is no failure: {error}", type_name="", traceback="")


def _instance(failure: Failure) -> Exception:
    if failure.family == "onnx_dl" and failure.name in BY_CODE:
        return _call(BY_CODE[failure.name], failure)
    if failure.family == "builtin":
        cls = getattr(builtins, failure.name, None)
    elif failure.family == "onnxruntime":
        cls = getattr(importlib.import_module(_C), failure.name, None)
    else:
        cls = None
    if isinstance(cls, type) and issubclass(cls, Exception):
        return _call(cls, failure)
    return _remote(failure)


def _call(cls: type[Exception], failure: Failure) -> Exception:
    try:
        return cls(*failure.args)
    except Exception:  # UnicodeDecodeError and its like refuse other arguments than their own
        return _remote(failure)


def _remote(failure: Failure) -> RemoteError:
    message = f"{failure.name}: {failure.args[0] if failure.args else ''}"
    return RemoteError(message, type_name=failure.name, traceback=failure.traceback)


def _plain(error: BaseException) -> list[Any]:
    """The exception's arguments if they can travel, else its text."""
    args = list(error.args)
    if isinstance(error, OSError) and error.filename is not None:  # OSError keeps these out of its args
        args = [error.errno, error.strerror, error.filename, None, error.filename2]
    try:
        msgspec.msgpack.encode(args)
    except (TypeError, OverflowError, ValueError):
        return [_text(error)]
    return args


def _text(error: object) -> str:
    """Its text, with what is no Unicode (file names of another encoding) escaped."""
    return str(error).encode(errors="backslashreplace").decode()


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """An exception on its way; see :mod:`onnx_dl.protocol.failures`."""

    family: str
    name: str
    args: list[Any]
    details: dict[str, Any] = {}
    traceback: str = ""
