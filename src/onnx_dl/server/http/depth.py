"""How deep JSON is nested, found before it is decoded.  Pure."""

from __future__ import annotations

import re
from typing import Final

import numpy as np

from onnx_dl.server.v2.failures import invalid

_TEXT: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_NOT_BRACKETS: Final = bytes(code for code in range(256) if code not in b"[]{}")
_STEP: Final = np.zeros(256, np.int8)
_STEP[list(b"[{")] = 1
_STEP[list(b"]}")] = -1


def check_depth(json: bytes, most: int) -> None:
    """Raises RequestFailure (400) if JSON is nested deeper than ``most`` levels."""
    if json.count(b"[") + json.count(b"{") > most and depth(json) > most:
        raise invalid(f"The JSON of the request is nested deeper than {most} levels.")


def depth(json: bytes) -> int:
    """Levels of nesting; brackets in text do not count.  Of what is not JSON: some number."""
    brackets = _TEXT.sub(b"", json).translate(None, _NOT_BRACKETS)
    steps = _STEP[np.frombuffer(brackets, np.uint8)]
    return max(0, int(np.cumsum(steps, dtype=np.int64).max(initial=0)))
