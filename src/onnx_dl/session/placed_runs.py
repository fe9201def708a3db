"""Runs whose inputs and results may lie in memory of a third process, for programs that serve others.

Differs from ``InferenceSessionProxy.run`` in three points: an input may be a
:class:`~onnx_dl.tensors.foreign.ForeignArray`, a result may have a place there, and the deadline of a run is
one that another thread may end.

A worker gets the descriptor of the memory and reads and writes it itself.  This process does that where the
data is small, where the model has no worker, where the worker is sandboxed and must not get at memory of
others, and where one run names more memories than a lane has room for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Final

from onnx_dl.client import awaited_calls
from onnx_dl.client.cancellation import CancelWatch, not_begun
from onnx_dl.client.pending_call import RETRY
from onnx_dl.client.remote_model import RemoteModel
from onnx_dl.client.served_model import PlacedArguments, RunArguments, ServedModel
from onnx_dl.concurrency.deadline import Deadline, DeadlinePassed
from onnx_dl.core.types import Feed, Value
from onnx_dl.session.inference_session import InferenceSessionProxy
from onnx_dl.session.inputs import names_of, sharing
from onnx_dl.session.model_handle import ModelHandle
from onnx_dl.tensors.foreign import ForeignArray, ForeignPlace
from onnx_dl.tensors.foreign_tables import MOST_NAMED, TooManyMemories

_SMALL: Final = 64 << 10
"""Bytes below which two copies here take less time than telling the worker what to read and write."""


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
        places: by output name, where results are written.  In the returned list, ``Written`` stands for a
            result that was written.  A result that is not only bytes (text, a list) is returned as it is.
        deadline: all waits share it.  If it is movable, ``deadline.end()`` in another thread ends the run.

    Raises:
        RunTimeout: the deadline passed, or was ended.
        PlaceTooSmall: a result does not fit its place.  Nothing was written; into memory that is mapped, the
            engine may have written a part.
        ForeignMemoryError: the memory of an input or a place is closed, or is not there any more.
        WorkerDied: the worker ended during the call, as by memory that is mapped and was truncated.
        Exception: onnxruntime's own.
    """
    handle = proxy._handle
    try:
        model = handle.model(deadline)  # first: names of all outputs are known after a load
        arguments = _placed(proxy, names, feed, places)
        watch = CancelWatch(deadline=deadline)
        if isinstance(arguments, RunArguments):
            return _in_order(arguments, model.run(handle.lease, *arguments, watch))
        if isinstance(model, RemoteModel) and _goes_along(handle, arguments):
            try:
                return _run_there(model, handle, arguments, watch)
            except TooManyMemories:  # nothing was sent
                pass
        return _run_here(model, handle, arguments, watch)
    except DeadlinePassed as passed:
        raise not_begun(deadline, passed) from None


def small(names: Sequence[str], feed: Feed, places: Mapping[str, ForeignPlace]) -> PlacedArguments | None:
    """The arguments of a run with so little in foreign memory that this process reads and writes it.

    For a caller that makes such a run in another way: of the copied feed, and then ``.written(results)``.
    None: nothing lies there, or more, or the names of the outputs are not known.
    """
    if not names or not _is_placed(feed, places):
        return None
    arguments = PlacedArguments(list(names), feed, places)
    return arguments if arguments.foreign_bytes < _SMALL else None


def copied(feed: Feed) -> Feed:
    """A feed with copies of what lies in foreign memory.  Raises ForeignMemoryError if that is not there."""
    return {name: value.copy() if type(value) is ForeignArray else value for name, value in feed.items()}


def in_use(proxy: InferenceSessionProxy) -> bool:
    """True if the proxy uses its present worker already, so that a run need not wait for a load."""
    return proxy._handle.in_use() is not None


def bind(proxy: InferenceSessionProxy, deadline: Deadline) -> None:
    """Has the model loaded and used by the proxy.  Raises DeadlinePassed, and what a run raises before it
    begins."""
    proxy._handle.model(deadline)


async def arun(
    proxy: InferenceSessionProxy,
    names: Sequence[str] | None,
    feed: Feed,
    places: Mapping[str, ForeignPlace],
    timeout: float | None,
) -> list[Value]:
    """:func:`run` for asyncio and trio, without a thread per call.  Cancelling it ends the run; after
    ``timeout`` seconds it raises RunTimeout."""
    handle, deadline = proxy._handle, Deadline(timeout)
    # Names of all outputs may need a load, for which the loop must not wait.
    arguments = _placed(proxy, names, feed, places) if names or not _is_placed(feed, places) else None
    sent = arguments
    if isinstance(arguments, PlacedArguments) and arguments.foreign_bytes < _SMALL:
        sent = arguments.copied()
    if isinstance(sent, RunArguments) or (sent is not None and _goes_along(handle, sent)):
        find = handle.in_use() or handle.model
        try:
            result: list[Value] = await awaited_calls.call(find, handle.lease, sent, timeout, None)
        except TooManyMemories:  # as in run()
            pass
        else:
            if isinstance(arguments, PlacedArguments) and isinstance(sent, RunArguments):
                return arguments.written(result)
            return _in_order(sent, result)
    return await awaited_calls.in_thread(functools.partial(run, proxy, names, feed, places), deadline.left())


def _placed(
    proxy: InferenceSessionProxy, names: Sequence[str] | None, feed: Feed, places: Mapping[str, ForeignPlace]
) -> RunArguments | PlacedArguments:
    """The arguments of a plain run if nothing lies in foreign memory."""
    if not _is_placed(feed, places):
        return RunArguments(names_of(names), feed, None)
    named = list(names) if names else [node.name for node in proxy.get_outputs()]
    return PlacedArguments(named, feed, {name: place for name, place in places.items() if name in named})


def _is_placed(feed: Feed, places: Mapping[str, ForeignPlace]) -> bool:
    return bool(places) or any(type(value) is ForeignArray for value in feed.values())


def _goes_along(handle: ModelHandle, arguments: PlacedArguments) -> bool:
    """True if the worker gets the descriptors."""
    if not handle.spec.isolation or handle.spec.sandbox:
        return False
    return arguments.foreign_bytes >= _SMALL and arguments.memories <= MOST_NAMED


def _run_there(
    model: RemoteModel, handle: ModelHandle, arguments: PlacedArguments, watch: CancelWatch
) -> list[Value]:
    while True:
        call = model.prepare(handle.lease, lambda lane: arguments.encode(lane.codec), watch.deadline)
        result: list[Value] = call.perform(watch)
        if result is not RETRY:
            return result


def _run_here(
    model: ServedModel, handle: ModelHandle, arguments: PlacedArguments, watch: CancelWatch
) -> list[Value]:
    """Reads the inputs and writes the results in this process."""
    results: list[Value] = model.run(handle.lease, *arguments.copied(), watch)
    return arguments.written(results)


def _in_order(arguments: RunArguments | PlacedArguments, result: list[Value]) -> list[Value]:
    """The results; those of a repeated name share their memory."""
    names = arguments.outputs
    return result if names is None or len(names) < 2 else sharing(names, result)
