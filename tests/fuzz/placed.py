"""Calls with places as a worker gets them, without a lane and without a model."""

from __future__ import annotations

import os
import random
from typing import Any

import msgspec
import numpy as np

from onnx_dl.protocol import lane
from onnx_dl.tensors.foreign_tables import PeerMemories
from onnx_dl.workers.engines.base import BoundRun, CancelToken
from onnx_dl.workers.placed_calls import PlacedCalls

_SIZE = 4096


class PlacedCallsAlone:
    """The worker's side of such calls.  It stands for the lane and for the model, too: results of any kind,
    and a truncated memory now and then."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.memories = PeerMemories(4)
        for number, is_mapped in ((7, False), (8, True), (9, False)):
            fd = os.memfd_create("foreign")
            os.ftruncate(fd, 64 if number == 9 else _SIZE)
            self.memories.add(number, _SIZE, is_mapped, fd)
        self._read = msgspec.msgpack.Decoder(lane.PlacedCall)
        self._calls = PlacedCalls(self, self, CancelToken())  # type: ignore[arg-type]

    def corpus(self) -> list[bytes]:
        found = []
        for memory in (7, 8):
            for dtype, shape, offset in (("<f4", (4, 4), 0), ("|b1", (3,), 5), ("<i8", (0, 9), 64)):
                call = lane.PlacedCall(
                    outputs=["y", "z"],
                    foreign=[("x", lane.Foreign(dtype, shape, memory, offset))],
                    places=[("y", lane.Place(memory, 64, 64)), ("z", lane.Place(memory, 1024, 64))],
                )
                found.append(msgspec.msgpack.encode(call))
        return found

    def take(self, data: bytes) -> None:
        try:
            call = self._read.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return
        self._asked = len(call.outputs)
        for _ in range(3):  # the third time it is bound
            self._calls.call(call)
        if self._rng.random() < 0.01:
            self._calls.trim()

    # --- as a lane ----------------------------------------------------------------------------------------

    def unpack(self, value: lane.Value) -> object:
        return np.zeros(3, np.float32)

    def reply_placed(self, values: list[object], written: list[lane.WrittenResult]) -> None:
        assert len(values) + len(written) == self._asked

    def send(self, reply: bytes) -> None:
        told = msgspec.msgpack.decode(reply)
        assert len(told["written"]) == self._asked

    # --- as a model ---------------------------------------------------------------------------------------

    def run(
        self, outputs: list[str], feed: dict[str, Any], options: object, token: CancelToken
    ) -> list[object]:
        for value in feed.values():
            value.tobytes()  # all of it can be read
        some = (np.ones((4, 4), np.float32), np.ones(2, bool), np.array(["text"], object), [{"a": 1}])
        chosen = some[:2] if self._rng.random() < 0.8 else some
        return [self._rng.choice(chosen) for _ in outputs]

    def bind(self, outputs: list[str], feed: dict[str, Any], results: list[Any]) -> BoundRun | None:
        def run() -> None:
            for value in feed.values():
                value.tobytes()
            for result in results:
                result[...] = 1
            if self._rng.random() < 0.1:
                raise ValueError("another shape")

        return None if self._rng.random() < 0.1 else BoundRun(run, None)
