"""Runs with tensors of element types that numpy lacks, such as bfloat16, as arrays of unsigned integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx_dl.client.cancellation import CancelWatch, not_begun
from onnx_dl.concurrency.deadline import Deadline, DeadlinePassed
from onnx_dl.core.types import Array, Value
from onnx_dl.session.inference_session import InferenceSessionProxy

BFLOAT16 = 16
"""Number of ONNX's element type."""


def run(
    proxy: InferenceSessionProxy,
    names: Sequence[str],
    feed: Mapping[str, Array],
    types: Mapping[str, int],
    deadline: Deadline,
) -> list[Value]:
    """One inference, in this thread.  Inputs are copied once.

    Args:
        names: of the outputs to compute.
        feed: an array per input.
        types: numbers of ONNX's element types, of inputs whose dtype does not tell; the items of such an
            array have the size of that type, as those of uint16 have for bfloat16.
        deadline: all waits share it.  If it is movable, ``deadline.end()`` in another thread ends the run.

    Returns:
        An array per output, of a type that numpy lacks one of unsigned integers.

    Raises:
        RunTimeout: the deadline passed, or was ended.
        Exception: like ``InferenceSessionProxy.run``.
    """
    handle = proxy._handle
    fed = [(name, array, types.get(name, 0)) for name, array in feed.items()]
    watch = CancelWatch(deadline=deadline)
    try:
        model = handle.model(deadline)
        result: list[Value] = model.invoke(
            handle.lease, "run_with_types", list(names), fed, None, watch=watch
        )
    except DeadlinePassed as passed:
        raise not_begun(deadline, passed) from None
    return result
