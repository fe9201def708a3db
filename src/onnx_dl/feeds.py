"""Names and values of a call before they travel: what onnxruntime's Python code makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np

from onnx_dl.nodes import NodeArg

USERS: Final = 256
"""numpy's first number for dtypes that packages register, such as ml_dtypes' bfloat16."""
_STAND_INS: Final = ("c8", "c16", np.longdouble, np.clongdouble)
"""Dtypes of numpy's own that onnxruntime refuses in the same way."""
_NO_TYPE: Final = "Numpy_type {} can't be converted to MLDataType."


def check_names(feed: Any, inputs: Iterable[NodeArg]) -> None:
    """Raises ValueError, in onnxruntime's words, if an input is missing."""
    names = list(feed.keys())
    missing = [
        node.name for node in inputs if node.name not in names and not node.type.startswith("optional")
    ]
    if missing:
        raise ValueError(f"Required inputs ({missing}) are missing from input feed ({names}).")


def refuse_dtypes(feed: dict[str, Any], run: Callable[[dict[str, Any]], Any]) -> None:
    """Raises what onnxruntime raises for dtypes that a package registered.

    It tells their numbers, which are this process's only; so the model is run with others in their place.
    """
    arrays = {name: value for name, value in feed.items() if _has_users_dtype(value)}
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


def _has_users_dtype(value: Any) -> bool:
    return type(value) is np.ndarray and value.dtype.num >= USERS


def plain_name(name: Any) -> Any:
    """A str for a subclass of it (numpy's, an enumeration's); anything else is onnxruntime's to refuse."""
    return str.__str__(name) if type(name) is not str and isinstance(name, str) else name


def names_of(output_names: Any) -> Any:
    """Names of outputs in a form that travels: whatever it was that onnxruntime takes, a list."""
    if output_names is None or isinstance(output_names, list | tuple | str | bytes | dict):
        return output_names
    return list(output_names) if hasattr(output_names, "__iter__") else output_names or None


def sharing(names: Sequence[str], results: Sequence[Any]) -> list[Any]:
    """Results of a name that was asked for twice are one, as in onnxruntime."""
    if len(set(names)) == len(names):
        return list(results)
    first: dict[str, Any] = {}
    for name, result in zip(names, results, strict=True):
        first.setdefault(name, result)
    return [first[n].view() if isinstance(first[n], np.ndarray) else first[n] for n in names]
