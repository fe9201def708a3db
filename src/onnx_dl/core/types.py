"""Type aliases for onnxruntime's objects and for values of calls: onnxruntime has no types to check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
OrtObject: TypeAlias = Any
"""An object of one of onnxruntime's classes, Python's or native."""
Value: TypeAlias = Any
"""An input or output: an array, an OrtValue, a list or dict, None for an absent optional."""
Feed: TypeAlias = dict[str, Any]
"""A value per input name."""
PlainDict: TypeAlias = dict[str, Any]
"""Data that travels between processes: names to None, bools, numbers, text, and lists and dicts of these."""
Providers: TypeAlias = Sequence[Any] | None
"""Names, or (name, options) pairs; or a dict of options for each."""
