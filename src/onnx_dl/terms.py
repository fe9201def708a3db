"""Terms on which one proxy, or the host itself, holds a model.  Checked once, where they enter."""

from __future__ import annotations

from typing import Self

import msgspec

from onnx_dl import config


class Terms(msgspec.Struct, frozen=True):
    """TTL in seconds (-1: stays, 0: unloads after each use), how calls wait, and the rank at an eviction."""

    ttl: float = config.KEEP
    latency: str = "normal"
    pin: bool = False
    priority: int = 0

    @classmethod
    def parse(
        cls, ttl: object = config.KEEP, latency: object = "normal", pin: object = False, priority: object = 0
    ) -> Self:
        """Makes terms of what a user gave.

        Raises:
            ValueError: (as :class:`~onnx_dl.errors.ConfigError`) ``ttl`` is none of the three modes,
                ``latency`` or ``pin`` neither of its two, or ``priority`` no whole number.
        """
        return cls(
            config.parse_ttl(ttl),
            config.parse_latency(latency),
            config.parse_pin(pin),
            config.parse_priority(priority),
        )
