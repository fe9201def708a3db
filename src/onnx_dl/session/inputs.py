"""Names and values of a call before they travel, treated as onnxruntime's Python code does."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Sequence
from types import GeneratorType
from typing import Final, TypeGuard

import numpy as np

from onnx_dl.core.types import Feed, Value
from onnx_dl.ort.metadata import NodeArg
from onnx_dl.tensors import packing
from onnx_dl.tensors.call_plans import are_text
from onnx_dl.tensors.values import is_plain

USERS: Final = 256
"""numpy's first number for dtypes that packages register, such as bfloat16 of ml_dtypes."""
_STAND_INS: Final = ("c8", "c16", np.longdouble, np.clongdouble)
"""numpy's own dtypes that onnxruntime refuses in the same way."""
_NO_TYPE: Final = "Numpy_type {} can't be converted to MLDataType."


def check_names(feed: Feed, inputs: Iterable[NodeArg]) -> None:
    """Raises ValueError, in onnxruntime's words, if an input is missing."""
    names = list(feed.keys())
    missing = [
        node.name for node in inputs if node.name not in names and not node.type.startswith("optional")
    ]
    if missing:
        raise ValueError(f"Required inputs ({missing}) are missing from input feed ({names}).")


def check_owner(value: Value, session: object, action: str = "used with") -> None:
    """Raises ValueError if this OrtValue belongs to another session."""
    owner = getattr(value, "_session", None)
    if owner is not None and owner is not session and type(value).__name__ == "OrtValue":
        raise ValueError(f"Session-scoped OrtValue must be {action} the session that created it.")


def refuse_dtypes(feed: Feed, run: Callable[[Feed], object]) -> None:
    """Raises what onnxruntime raises for dtypes that a package registered.

    Its message has their numbers, which only this process knows: so the model is run with arrays of other
    dtypes in their place, and the numbers in the message are replaced.
    """
    arrays = {n: value for n, value in feed.items() if type(value) is np.ndarray and value.dtype.num >= USERS}
    numbers = {value.dtype.num: None for value in arrays.values()}
    others = dict(zip(numbers, _STAND_INS, strict=False))
    asked = {name: np.zeros(1, others.get(value.dtype.num, "c8")) for name, value in arrays.items()}
    try:
        run(feed | asked)
    except RuntimeError as error:
        for number, other in others.items():
            if str(error) == _NO_TYPE.format(np.dtype(other).num):
                raise RuntimeError(_NO_TYPE.format(number)) from None
        raise


def plain_name(name: Value) -> Value:
    """A str for a subclass of it (numpy's, an enumeration's).  onnxruntime refuses anything else."""
    return str.__str__(name) if type(name) is not str and isinstance(name, str) else name


def names_of(output_names: Value) -> Value:
    """Names of outputs in a form that travels: None for all, or a list of text.

    Not everything that onnxruntime takes for a list can travel, so it is decided here: a generator or an
    array of numpy's is a list, and neither text nor a dict nor an iterator is.  A refused value becomes one
    that can travel and that onnxruntime refuses in the same words.  Raises ValueError, in numpy's words, for
    an array that is neither true nor false.
    """
    if output_names is None or (type(output_names) is list and are_names(output_names)):
        return output_names or None
    if not output_names:
        return None
    if not _is_a_list(output_names):
        return _refused(output_names)
    len(output_names) if hasattr(output_names, "__len__") else None  # numpy's array of no dimension has none
    names = [_text_of(name) for name in output_names]
    return names if are_names(names) else _refused(names)


_VIEWS: Final[tuple[type, ...]] = (type({}.keys()), type({}.values()), type({}.items()))
_AS_LISTS: Final = (GeneratorType, set, frozenset, map, zip, *_VIEWS)


def are_names(names: list[Value]) -> TypeGuard[list[str]]:
    """True if all are text without surrogates, which onnxruntime refuses."""
    return are_text(names) and ((t := "".join(names)).isascii() or t.encode(errors="ignore").decode() == t)


def _is_a_list(value: Value) -> bool:
    """True if pybind11 takes it for a ``std::vector``."""
    if ctypes.pythonapi.PySequence_Check(ctypes.py_object(value)):
        return not isinstance(value, str | bytes)
    return isinstance(value, _AS_LISTS)


def _text_of(name: Value) -> Value:
    """A name as text, if pybind11 takes it for a ``std::string``."""
    if isinstance(name, bytes | bytearray):
        with contextlib.suppress(UnicodeDecodeError):
            return name.decode()
    return plain_name(name)


def _refused(value: Value) -> Value:
    with contextlib.suppress(UnicodeEncodeError):
        if is_plain(value):
            packing.encode(value)
            return value
    return repr(value).encode(errors="backslashreplace").decode()


def sharing(names: Sequence[str], results: Sequence[Value]) -> list[Value]:
    """The results, of which those of a repeated name share their memory, as in onnxruntime."""
    if len(set(names)) == len(names):
        return list(results)
    first: Feed = {}
    for name, result in zip(names, results, strict=True):
        first.setdefault(name, result)
    return [first[n].view() if isinstance(first[n], np.ndarray) else first[n] for n in names]
