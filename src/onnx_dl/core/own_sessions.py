"""Marks the code that makes onnxruntime's sessions for models in this process.

A patch of onnxruntime's class leaves those alone: they are what its proxies call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Final

_making: Final[ContextVar[bool]] = ContextVar("onnx_dl_making_session", default=False)


def are_made_here() -> bool:
    """True in a block of :func:`making`."""
    return _making.get()


@contextlib.contextmanager
def making() -> Iterator[None]:
    """Marks the block."""
    token = _making.set(True)
    try:
        yield
    finally:
        _making.reset(token)
