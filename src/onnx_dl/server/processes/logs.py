"""The server's log: one line each on stderr."""

from __future__ import annotations

import logging
import sys
from typing import Final

_log: Final = logging.getLogger("onnx_dl.server")


def begin(*, is_first: bool) -> None:
    """Sends this process's log to stderr.  ``is_first``: also what happens to models, which all hear of."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="onnx-dl: %(message)s")
    if not is_first:
        logging.getLogger("onnx_dl").setLevel(logging.WARNING)


def tell(text: str) -> None:
    """Writes one line."""
    _log.warning("%s", text)
