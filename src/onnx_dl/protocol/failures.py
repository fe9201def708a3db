"""Converts exceptions to data and back to the same class with the same message, for other processes.

Covers builtin exceptions, the exception classes of onnxruntime's C module, and our own.  Any other becomes a
:class:`~onnx_dl.errors.RemoteError`.  Classes are looked up in these three places only, so a peer cannot name
a class of its choice.
"""

from __future__ import annotations

import builtins
import importlib
import traceback
from typing import Any

import msgspec

from onnx_dl.errors import BY_CODE, OnnxDLError, RemoteError

_C = "onnxruntime.capi.onnxruntime_pybind11_state"


def describe(error: BaseException, **details: object) -> Failure:
    """Convert an exception to data; ``details`` are attributes that it gets when it is rebuilt."""
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


_keeps_engine_out = False


def keep_engine_out() -> None:
    """Have this process never import onnxruntime for an error: its classes become RemoteError from now on."""
    global _keeps_engine_out
    _keeps_engine_out = True


def rebuild(failure: Failure) -> Exception:
    """Return the exception to raise.  Imports onnxruntime only for one of onnxruntime's classes."""
    error = _instance(failure)
    for name, value in failure.details.items():
        if name == "cause":
            error.__cause__ = _cause(value)
        elif not hasattr(type(error), name):  # a peer adds attributes, it does not replace what a class has
            setattr(error, name, value)
    return error


def _cause(value: object) -> Exception:
    """Rebuild the cause of an exception from what a peer sent, which may be anything."""
    try:
        return rebuild(msgspec.convert(value, Failure))
    except (msgspec.ValidationError, RecursionError) as error:
        return RemoteError(f"The cause of this error could not be read: {error}", type_name="", traceback="")


def _instance(failure: Failure) -> Exception:
    if failure.family == "onnx_dl" and failure.name in BY_CODE:
        return _call(BY_CODE[failure.name], failure)
    if failure.family == "builtin":
        cls = getattr(builtins, failure.name, None)
    elif failure.family == "onnxruntime":
        if _keeps_engine_out:
            return _remote(msgspec.structs.replace(failure, name=f"{_C}.{failure.name}"))
        cls = getattr(importlib.import_module(_C), failure.name, None)
    else:
        cls = None
    if isinstance(cls, type) and issubclass(cls, Exception):
        return _call(cls, failure)
    return _remote(failure)


def _call(cls: type[Exception], failure: Failure) -> Exception:
    try:
        return cls(*failure.args)
    except Exception:  # UnicodeDecodeError and similar classes accept their own arguments only
        return _remote(failure)


def _remote(failure: Failure) -> RemoteError:
    message = f"{failure.name}: {failure.args[0] if failure.args else ''}"
    return RemoteError(message, type_name=failure.name, traceback=failure.traceback)


def _plain(error: BaseException) -> list[object]:
    """Return the exception's arguments if msgpack can encode them, else its text."""
    args: list[object] = list(error.args)
    if isinstance(error, OSError) and error.filename is not None:  # not among the args of OSError
        args = [error.errno, error.strerror, error.filename, None, error.filename2]
    try:
        msgspec.msgpack.encode(args)
    except (TypeError, OverflowError, ValueError):
        return [_text(error)]
    return args


def _text(error: object) -> str:
    """Return its text; surrogates (of file names in another encoding) are escaped."""
    return str(error).encode(errors="backslashreplace").decode()


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """An exception as data; see :mod:`onnx_dl.protocol.failures`."""

    family: str
    name: str
    args: list[Any]
    details: dict[str, Any] = {}
    traceback: str = ""
