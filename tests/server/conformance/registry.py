"""Where steps are registered, and what several of them need.

A step returns plain data, or raises the client's exception.  Steps leave the server as they found it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from tests.server.conformance.clients import Kit

Step = Callable[[Kit], Any]
REGISTERED: Final[dict[str, Step]] = {}


def step(function: Step) -> Step:
    """Registers a step by its name."""
    REGISTERED[function.__name__.replace("_", " ")] = function
    return function


def row(first: int = 0, rows: int = 1) -> np.ndarray:
    return np.arange(first, first + 16 * rows, dtype=np.int32).reshape(rows, 16)


def pair(kit: Kit, rows: int = 1, **binary: bool) -> list[Any]:
    return [kit.input(f"INPUT{i}", row(10 * i, rows), "INT32", **binary) for i in range(2)]
