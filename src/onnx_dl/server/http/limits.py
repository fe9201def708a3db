"""HttpLimits of the HTTP listener, and the decisions that only need numbers.  Pure.

A client that is slow holds its own connection and little else:

- A head must be there ten seconds after its first byte, however the bytes trickle in.
- A body takes memory in steps (64 KiB, 1, 8, 64, 256 MiB, all) as it arrives.  It is cut if nothing comes for
  ``body_idle`` seconds, or if its average falls below the rate that would need ``body_usual`` seconds.  A
  large one may take longer at 1 MiB/s or more, ``body_total`` seconds at most.
- An answer is cut if the client takes none of it for ``send_idle`` seconds.
"""

from __future__ import annotations

from typing import Final

import msgspec

HEAD_BYTES: Final = 64 << 10
HEADERS: Final = 100
JSON_BYTES: Final = 256 << 20
JSON_DEPTH: Final = 64
OTHER_BODY: Final = 1 << 20
"""Bytes of a body that is not of an inference."""
WAITING_BYTES: Final = 64 << 10
"""Bytes of later requests that a connection keeps while one is answered."""
SKIPPED: Final = 1 << 20
"""Bytes of a refused body that are read so that the connection can be kept."""
UNCOUNTED: Final = 64 << 10
"""Bytes of an answer up to which they are not counted as in flight while they wait for the client."""
STEPS: Final = (64 << 10, 1 << 20, 8 << 20, 64 << 20, 256 << 20)
"""Bytes that a body gets at first, and when these are full.  Each step copies; with smaller ones a body of
5 MiB took ten times as long."""
_SLOWEST: Final = 2048
"""Bytes per second of a body, at least."""
_LARGE_RATE: Final = 1 << 20
"""Bytes per second at which a large body may take longer than is usual."""


class HttpLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds, and a number of connections (0: what the descriptors of the process allow)."""

    head: float = 10.0
    idle: float = 75.0
    body_idle: float = 20.0
    body_grace: float = 10.0
    body_usual: float = 120.0
    body_total: float = 600.0
    send_idle: float = 30.0
    linger: float = 5.0
    """Time for a client that still sends a body which was refused, so that it can read why."""
    connections: int = 0


def next_step(length: int, filled: int) -> int:
    """Bytes of memory for a body of ``length``, of which ``filled`` are there."""
    return next((step for step in STEPS if filled < step < length), length)


def is_too_slow(received: int, length: int, elapsed: float, limits: HttpLimits) -> bool:
    """True if a body of ``length`` bytes comes so slowly that it is cut."""
    rate = max(_SLOWEST, length / limits.body_total, min(length / limits.body_usual, _LARGE_RATE))
    return received < rate * (elapsed - limits.body_grace)


def most_connections(limits: HttpLimits, descriptors: int) -> int:
    """Connections that are open at a time: half of the process's descriptors, 4,096 at most."""
    return limits.connections or max(16, min(4096, descriptors // 2))
