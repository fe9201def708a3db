"""The run of a prepared request, in a thread or awaited."""

from __future__ import annotations

import functools

from onnx_dl.client import awaited_calls
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.core.types import Value
from onnx_dl.server.inference.preparation import Prepared
from onnx_dl.session import placed_runs, short_runs, typed_runs
from onnx_dl.session.inference_session import InferenceSessionProxy


def run(proxy: InferenceSessionProxy, prepared: Prepared, deadline: Deadline) -> list[Value]:
    """Return the results in the order of ``prepared.names``.  Raises like :func:`placed_runs.run`."""
    if prepared.types:
        return typed_runs.run(proxy, prepared.names, prepared.feed, prepared.types, deadline)
    if not prepared.places:
        found = short_runs.run(proxy, prepared.names or None, prepared.feed, deadline)
        if found is not None:
            return found
    return placed_runs.run(proxy, prepared.names or None, prepared.feed, prepared.places, deadline)


async def arun(proxy: InferenceSessionProxy, prepared: Prepared, timeout: float | None) -> list[Value]:
    """:func:`run`, awaited.  Cancelling it ends the run."""
    if prepared.types:
        return await awaited_calls.in_thread(functools.partial(run, proxy, prepared), timeout)
    if not prepared.places:
        found = await short_runs.arun(
            proxy, prepared.names or None, prepared.feed, timeout, prepared.signature.patience
        )
        if found is not None:
            return found
    return await placed_runs.arun(proxy, prepared.names or None, prepared.feed, prepared.places, timeout)
