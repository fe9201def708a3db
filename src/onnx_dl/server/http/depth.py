"""Levels of JSON, and the number of its values, found before it is decoded.  Pure.

Decoded, JSON takes more memory than its text: a list 60 bytes, a number or text up to 60.  So the number of
values is limited, too: all of them are decoded in one step, in which the process does nothing else.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from onnx_dl.server.v2.bounds import MOST_VALUES
from onnx_dl.server.v2.failures import invalid, too_large

MOST_LISTS: Final = 1 << 20
"""Lists and objects in one request."""
_MARKS: Final = b'"[]{}'
_NOT_MARKS: Final = bytes(code for code in range(256) if code not in _MARKS)
_QUOTE: Final = ord('"')
_STEP: Final = np.zeros(256, np.int8)
_STEP[list(b"[{")] = 1
_STEP[list(b"]}")] = -1
_BLOCK: Final = 1 << 20


def check_json(json: bytes, most_levels: int) -> None:
    """Checks JSON by counts of its bytes.

    Raises:
        RequestFailure: 400: it is nested deeper than ``most_levels``; 413: it has too many values.
    """
    if json.count(b",") > MOST_VALUES:
        raise too_large(f"The JSON of the request has more than {MOST_VALUES} values.  Send binary data.")
    if json.count(b"[") + json.count(b"{") <= most_levels:
        return
    levels, lists = shape(json)
    if levels > most_levels:
        raise invalid(f"The JSON of the request is nested deeper than {most_levels} levels.")
    if lists > MOST_LISTS:
        raise too_large(
            f"The JSON of the request has more than {MOST_LISTS} lists and objects.  Send data in one list, "
            "or binary data."
        )


def shape(json: bytes) -> tuple[int, int]:
    """Levels of nesting, and the number of lists and objects.  Brackets in text do not count.  Of what is not
    JSON: some numbers."""
    if b"\\" in json:  # backslashes are in text only; what is left of quotes begins and ends it
        json = json.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = json.translate(None, _NOT_MARKS)
    deepest = level = lists = quotes = 0
    for at in range(0, len(marks), _BLOCK):
        block = np.frombuffer(marks, np.uint8, min(_BLOCK, len(marks) - at), at)
        quoted = np.cumsum(block == _QUOTE, dtype=np.int32) + quotes
        steps = np.where(quoted & 1, np.int8(0), _STEP[block])
        levels = np.cumsum(steps, dtype=np.int32) + level
        deepest = max(deepest, int(levels.max()))
        lists += int(np.count_nonzero(steps == 1))
        level, quotes = int(levels[-1]), int(quoted[-1] & 1)
    return deepest, lists
