"""Terms on which one proxy, or the host itself, holds a model.  Checked once, where they enter."""

from __future__ import annotations

from typing import Self

import msgspec

from onnx_dl.core import parsing


class Terms(msgspec.Struct, frozen=True):
    """TTL in seconds (-1: stays, 0: unloads after each use), how calls wait, and the rank at an eviction."""

    ttl: float = parsing.KEEP
    latency: str = "normal"
    pin: bool = False
    priority: int = 0

    @classmethod
    def parse(
        cls, ttl: object = parsing.KEEP, latency: object = "normal", pin: object = False, priority: object = 0
    ) -> Self:
        """Makes terms of what a user gave.

        Raises:
            ValueError: (as :class:`~onnx_dl.errors.ConfigError`) ``ttl`` is none of the three modes,
                ``latency`` or ``pin`` neither of its two, or ``priority`` no whole number.
        """
        return cls(
            parsing.parse_ttl(ttl),
            parsing.parse_latency(latency),
            parsing.parse_pin(pin),
            parsing.parse_priority(priority),
        )
