"""Runs that a worker has bound before, made again by a number alone: no message is written or read."""

from __future__ import annotations

from typing import Final

from onnx_dl.client.acquisition import Lease
from onnx_dl.client.pending_call import PendingCall, abandon
from onnx_dl.client.remote_model import RemoteModel
from onnx_dl.client.served_model import ServedModel
from onnx_dl.protocol.lane import Invoke, SameResult
from onnx_dl.tensors.call_plans import DEVICE_RUNS
from onnx_dl.transport.call_channel import SAME

_REQUEST: Final = Invoke(method="")
"""Stands for the request, which has no message."""


def repeat(model: ServedModel, lease: Lease, number: int) -> bool:
    """Makes the run of this number on an idle lane, if that knows it.  False: it was not made.

    Raises:
        WorkerDied: the worker ended during the call, which may have been executed in part.
        DescriptorsExhausted: this process may open no more files.
        Exception: what onnxruntime raised, as the same class.
    """
    if not isinstance(model, RemoteModel) or number not in DEVICE_RUNS:
        return False
    pool = model.worker.usable_by(lease)
    if pool is None or lease.closed or model.connection.closed:
        return False
    if (lane := pool.take(lease.terms.latency)) is None:
        return False
    if lane.arena.memories.has_news:  # a number alone would not tell the worker
        pool.put(lane)
        return False
    try:
        reply = lane.repeat(number)
    except BaseException as error:  # KeyboardInterrupt included: the reply is still to come
        abandon(pool, lane, error)
        raise
    if reply != SAME and type(reply) is not SameResult:
        PendingCall(pool, lane, _REQUEST).conclude(reply)
        return False
    lanes = pool.idle[lane.latency]
    lanes.append(lane)  # and as in pool.put(), but the size of the lane is what it was
    if pool.is_gone:
        pool.close_idle()
    elif lane.was_large or len(lanes) > 1:
        pool.connection.arm()
    return True
