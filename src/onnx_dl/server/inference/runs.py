"""The run of a prepared request, in a thread or awaited."""

from __future__ import annotations

import functools

from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.core.types import Value
from onnx_dl.server.inference.preparation import Prepared
from onnx_dl.server.inference.threads import Threads
from onnx_dl.session import placed_runs, short_runs, typed_runs
from onnx_dl.session.inference_session import InferenceSessionProxy


def run(proxy: InferenceSessionProxy, prepared: Prepared, deadline: Deadline) -> list[Value]:
    """Return the results in the order of ``prepared.names``.  Raises like :func:`placed_runs.run`."""
    if prepared.types:
        feed = placed_runs.copied(prepared.feed)
        return typed_runs.run(proxy, prepared.names, feed, prepared.types, deadline)
    small = placed_runs.small(prepared.names, prepared.feed, prepared.places)
    if small is not None or not prepared.places:
        feed = prepared.feed if small is None else placed_runs.copied(prepared.feed)
        found = short_runs.run(proxy, prepared.names or None, feed, deadline)
        if found is not None:
            return found if small is None else small.written(found)
    return placed_runs.run(proxy, prepared.names or None, prepared.feed, prepared.places, deadline)


async def arun(
    proxy: InferenceSessionProxy, prepared: Prepared, timeout: float | None, threads: Threads
) -> list[Value]:
    """:func:`run`, awaited.  Cancelling it ends the run."""
    if prepared.types:
        return await threads.run(functools.partial(run, proxy, prepared), timeout)
    deadline = Deadline(timeout)
    small = placed_runs.small(prepared.names, prepared.feed, prepared.places)
    if small is not None or not prepared.places:
        feed = prepared.feed if small is None else placed_runs.copied(prepared.feed)
        found = await short_runs.arun(
            proxy, prepared.names or None, feed, deadline, prepared.signature.patience
        )
        if found is not None:
            return found if small is None else small.written(found)
    names, left = prepared.names or None, deadline.left()
    return await placed_runs.arun(proxy, names, prepared.feed, prepared.places, left)
