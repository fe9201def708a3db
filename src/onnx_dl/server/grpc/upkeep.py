"""Work that is done once a second, beside all calls: the look for messages that are late."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from onnx_dl.server.grpc.bounds import Arrivals

_EVERY: Final = 1.0


class Upkeep:
    """Runs on the server's loop until it is closed."""

    def __init__(self, loop: asyncio.AbstractEventLoop, arrivals: Arrivals) -> None:
        self._loop = loop
        self._arrivals = arrivals
        self._is_closed = False
        loop.call_soon_threadsafe(self._look)

    def close(self) -> None:
        """Ends it at its next look.  Idempotent."""
        self._is_closed = True

    def _look(self) -> None:
        if self._is_closed:
            return
        self._arrivals.look(time.monotonic())
        self._loop.call_later(_EVERY, self._look)
