"""Memory of the last minutes: what ``onnx-dl top`` remembers from one snapshot to the next."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import NamedTuple

from onnx_dl.host.model_host import Snapshot


class _Sample(NamedTuple):
    at: float
    in_use: int
    pss: dict[tuple[str, str], int]


class Line(NamedTuple):
    """The bytes of one model, from the oldest sample to the newest; 0 where it was not loaded."""

    model: str
    key: str
    values: list[int]


class History:
    """The last ``length`` samples; older ones are forgotten."""

    def __init__(self, length: int) -> None:
        self._samples: collections.deque[_Sample] = collections.deque(maxlen=length)

    def add(self, snapshot: Snapshot, now: float) -> None:
        """``now`` in seconds, of any clock that only goes on."""
        pss = {(status.model, status.key): status.usage.pss for status in snapshot.models}
        self._samples.append(_Sample(now, snapshot.memory_in_use, pss))

    @property
    def seconds(self) -> float:
        """The time from the oldest sample to the newest."""
        return self._samples[-1].at - self._samples[0].at if self._samples else 0.0

    @property
    def in_use(self) -> list[int]:
        """Bytes of all models together."""
        return [sample.in_use for sample in self._samples]

    def models(self) -> list[Line]:
        """All models that any of the samples has, also those that are gone since."""
        return [
            Line(model, key, [sample.pss.get((model, key), 0) for sample in self._samples])
            for model, key in _in_order(pair for sample in self._samples for pair in sample.pss)
        ]


def _in_order(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return list(dict.fromkeys(pairs))
