"""Runs that are like the last one, with a deadline that another thread may end, or awaited."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_dl.client import short_calls
from onnx_dl.client.short_calls import Patience
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.core.types import Feed, Value
from onnx_dl.session.inference_session import InferenceSessionProxy


def run(
    proxy: InferenceSessionProxy, names: Sequence[str] | None, feed: Feed, deadline: Deadline
) -> list[Value] | None:
    """One inference, in this thread, if it is like the last one and its arrays are small; None: it is not,
    and was not executed.  Raises like :func:`~onnx_dl.session.placed_runs.run`."""
    handle = proxy._handle
    call = short_calls.begin(handle.used, handle.lease, names, feed)
    return None if call is None else short_calls.finish(call, deadline)


async def arun(
    proxy: InferenceSessionProxy,
    names: Sequence[str] | None,
    feed: Feed,
    deadline: Deadline,
    patience: Patience,
) -> list[Value] | None:
    """:func:`run`, awaited on asyncio.  Cancelling it ends the run.  The loop itself waits for a moment if
    the model usually answers within that."""
    handle = proxy._handle
    call = short_calls.begin(handle.used, handle.lease, names, feed)
    return None if call is None else await short_calls.afinish(call, deadline, patience)
