"""Runs whose inputs and results may lie in memory of a third process, for programs that serve others.

Differs from ``InferenceSessionProxy.run`` in three points: an input may be a
:class:`~onnx_dl.tensors.foreign.ForeignArray`, a result may have a place there, and the deadline of a run is
one that another thread may end.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from onnx_dl.client import awaited_calls
from onnx_dl.client.cancellation import CancelWatch, not_begun
from onnx_dl.client.served_model import RunArguments
from onnx_dl.concurrency.deadline import Deadline, DeadlinePassed
from onnx_dl.core.types import Feed, Value
from onnx_dl.session.inference_session import InferenceSessionProxy
from onnx_dl.session.inputs import names_of, sharing
from onnx_dl.tensors import foreign_results
from onnx_dl.tensors.foreign import ForeignArray, ForeignPlace


def run(
    proxy: InferenceSessionProxy,
    names: Sequence[str] | None,
    feed: Feed,
    places: Mapping[str, ForeignPlace],
    deadline: Deadline,
) -> list[Value]:
    """One inference, in this thread.

    Args:
        names: of the outputs to compute; None: all.
        feed: a value per input name, as for ``InferenceSessionProxy.run``, or a ``ForeignArray``.
        places: by output name, where results are written; they are ``Written`` in the returned list.
        deadline: all waits share it.  If it is movable, ``deadline.end()`` in another thread ends the run.

    Raises:
        RunTimeout: the deadline passed, or was ended.
        ForeignMemoryError: an input or a place is not there; PlaceTooSmall: a result does not fit its place.
        WorkerDied: the worker ended during the call, as by a memory that is mapped and was truncated.
        Exception: onnxruntime's own.
    """
    handle = proxy._handle
    outputs = names_of(names)
    try:
        model = handle.model(deadline)
        fed = _read_here(feed)
        result: list[Value] = model.run(handle.lease, outputs, fed, None, CancelWatch(deadline=deadline))
    except DeadlinePassed as passed:
        raise not_begun(deadline, passed) from None
    if places:
        named = outputs or [node.name for node in proxy.get_outputs()]
        return foreign_results.placed(named, result, places)
    return result if outputs is None or len(outputs) < 2 else sharing(outputs, result)


def in_use(proxy: InferenceSessionProxy) -> bool:
    """True if the proxy uses its present worker already, so that a run need not wait for a load."""
    return proxy._handle.in_use() is not None


def bind(proxy: InferenceSessionProxy, deadline: Deadline) -> None:
    """Has the model loaded and used by the proxy.  Raises DeadlinePassed, and what a run raises before it
    begins."""
    proxy._handle.model(deadline)


def _read_here(feed: Feed) -> Feed:
    """The feed with copies of what lies in foreign memory."""
    return {name: value.copy() if type(value) is ForeignArray else value for name, value in feed.items()}


async def arun(
    proxy: InferenceSessionProxy,
    names: Sequence[str] | None,
    feed: Feed,
    places: Mapping[str, ForeignPlace],
    timeout: float | None,
) -> list[Value]:
    """:func:`run` for asyncio and trio, without a thread per call.  Cancelling it ends the run; after
    ``timeout`` seconds it raises RunTimeout."""
    if places or any(type(value) is ForeignArray for value in feed.values()):
        return await awaited_calls.in_thread(functools.partial(run, proxy, names, feed, places), timeout)
    handle = proxy._handle
    outputs = names_of(names)
    result: list[Value] = await awaited_calls.call(
        handle.in_use() or handle.model, handle.lease, RunArguments(outputs, feed, None), timeout, None
    )
    return result if outputs is None or len(outputs) < 2 else sharing(outputs, result)
