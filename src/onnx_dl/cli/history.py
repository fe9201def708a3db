"""Memory use over the last minutes, for ``onnx-dl top``."""

from __future__ import annotations

import collections
from typing import NamedTuple

from onnx_dl.core.status import Snapshot


class _Sample(NamedTuple):
    at: float
    in_use: int
    pss: dict[tuple[str, str], int]


class Line(NamedTuple):
    """Bytes of one model, from the oldest sample to the newest; 0 while it was not loaded."""

    model: str
    key: str
    values: list[int]


class History:
    """The last ``length`` samples."""

    def __init__(self, length: int) -> None:
        self._samples: collections.deque[_Sample] = collections.deque(maxlen=length)

    def add(self, snapshot: Snapshot, now: float) -> None:
        """Adds a sample.  ``now``: seconds of any monotonic clock."""
        pss = {(status.model, status.key): status.usage.pss for status in snapshot.models}
        self._samples.append(_Sample(now, snapshot.memory_in_use, pss))

    @property
    def seconds(self) -> float:
        """The time from the oldest sample to the newest."""
        return self._samples[-1].at - self._samples[0].at if self._samples else 0.0

    @property
    def in_use(self) -> list[int]:
        """Bytes of all models together, by sample."""
        return [sample.in_use for sample in self._samples]

    def models(self) -> list[Line]:
        """All models of any sample, including those that are unloaded now."""
        return [
            Line(model, key, [sample.pss.get((model, key), 0) for sample in self._samples])
            for model, key in dict.fromkeys(pair for sample in self._samples for pair in sample.pss)
        ]
