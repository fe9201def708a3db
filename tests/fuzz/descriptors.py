"""Descriptors that a peer may send instead of those that it should."""

from __future__ import annotations

import os
import random
import socket

from onnx_dl.tensors import segment
from onnx_dl.tensors.block import HEADER


class Odd:
    """Some of every kind; closed together."""

    def __init__(self) -> None:
        self._pipe = os.pipe()
        self._pair = socket.socketpair()
        sealed = [segment.create(HEADER + size) for size in (0, 4096, 65536)]
        loose = [os.memfd_create("loose") for _ in range(3)]
        os.posix_fallocate(loose[0], 0, HEADER + 65536)
        os.truncate(loose[1], 1 << 42)  # of a size that no machine has, and that nothing was taken for
        read_only = os.open(f"/proc/self/fd/{sealed[1]}", os.O_RDONLY)
        self._good = sealed
        self._fds = [
            *sealed,
            *sealed,
            *loose,
            read_only,
            *self._pipe,
            os.eventfd(0),
            os.open("/", os.O_RDONLY),
            os.open(os.devnull, os.O_RDWR),
            os.open("/dev/zero", os.O_RDWR),
            os.open(__file__, os.O_RDONLY),
        ]

    def some(self, rng: random.Random) -> int:
        return rng.choice(self._good if rng.random() < 0.6 else [*self._fds, self._pair[0].fileno()])

    def close(self) -> None:
        for fd in set(self._fds):
            os.close(fd)
        for end in self._pair:
            end.close()
