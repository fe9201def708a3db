"""Work of a standby worker before a model needs it.

It has its process, its connection to the supervisor and its listening socket, and it has loaded and run a
throw-away model, so that the code and the heap of a load are in memory of its own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Final

import numpy as np

from onnx_dl.core.spec import ModelSpec
from onnx_dl.protocol.template import Assign, on_standby
from onnx_dl.tensors import segment
from onnx_dl.transport.sockets import Channel
from onnx_dl.workers.engines import base as backends
from onnx_dl.workers.engines.base import Backend, CancelToken

THROW_AWAY: Final = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02'
    b"\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)
"""Model of 65 bytes: y = Identity(x), float32[1]."""
_NAME: Final = "throw-away"


def rehearse() -> None:
    """Loads, describes and runs the throw-away model once, with one thread.

    A failure is none of the standby worker's: the load that follows fails in the same way, and tells.
    """
    with contextlib.suppress(Exception), _throw_away(["CPUExecutionProvider"]) as backend:
        backend.describe()
        feed: dict[str, object] = {"x": np.zeros(1, np.float32)}
        results = [np.zeros(1, np.float32)]
        backend.run(None, feed, None, CancelToken())
        if (bound := backend.bind(None, feed, results)) is not None:
            bound.run()


def prepare(device_id: int) -> None:
    """Makes a session of the throw-away model on a GPU, which loads CUDA's libraries and makes its context.

    A failure is the load's, too, and that tells.
    """
    cuda = ["CUDAExecutionProvider", {"device_id": device_id}]
    with contextlib.suppress(Exception), _throw_away([cuda, "CPUExecutionProvider"]):
        pass


@contextlib.contextmanager
def _throw_away(providers: list[object]) -> Iterator[Backend]:
    """The throw-away model, loaded with one thread."""
    blob = segment.freeze(THROW_AWAY)
    options = {"intra_op_num_threads": 1, "inter_op_num_threads": 1, "log_severity_level": 4}
    spec = ModelSpec(key=_NAME, name=_NAME, cwd="/", blob=_NAME, options=options, providers=providers)
    try:
        yield backends.load(spec, {_NAME: blob})
    finally:
        os.close(blob)


def await_assignment(lifeline: Channel) -> tuple[Assign, dict[str, int]] | None:
    """Waits until a model needs this process; returns also the blobs, by tag.

    None: the supervisor is gone.
    """
    received = lifeline.receive()
    if received is None:
        return None
    data, fds = received
    assign = on_standby(data)
    return assign, dict(zip(assign.blobs, fds, strict=True))
