"""Requests that differ from the last one in their bytes only: what was checked then holds for them, too."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np

from onnx_dl.core.types import Value
from onnx_dl.server.inference.checks import Signature
from onnx_dl.server.inference.inputs import numpy_type
from onnx_dl.server.v2.messages import InferRequest, InputTensor

_LARGEST: Final = 32 << 10
"""Bytes of an input.  Larger ones are looked at where they lie."""
_CHECKED: Final = frozenset(("BOOL", "BF16"))
"""Datatypes whose bytes are looked at, or that need more than their bytes."""


class InputLayout(NamedTuple):
    """One input of such requests."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    nbytes: int


class RepeatedRequest(NamedTuple):
    """A request that was found to be valid, without its bytes."""

    signature: Signature
    inputs: tuple[InputLayout, ...]
    wanted: tuple[str, ...]
    """Outputs that it names."""
    names: list[str]
    """Outputs to compute."""
    rows: int

    def feed(self, request: InferRequest) -> dict[str, Value] | None:
        """Return the values of a request that is like this; None: it is another."""
        if len(request.inputs) != len(self.inputs) or len(request.outputs) != len(self.wanted):
            return None
        for output, wanted in zip(request.outputs, self.wanted, strict=True):
            if output.name != wanted or output.region is not None or output.parameters:
                return None
        feed: dict[str, Value] = {}
        for tensor, (name, datatype, shape, dtype, nbytes) in zip(request.inputs, self.inputs, strict=True):
            data = tensor.data
            if tensor.name != name or tensor.datatype != datatype or tensor.shape != shape:
                return None
            if type(data) is memoryview:
                if data.nbytes != nbytes:
                    return None
            elif type(data) is not bytes or len(data) != nbytes:
                return None
            feed[name] = np.ndarray(shape, dtype, data)
        return feed


def remembered(
    signature: Signature, request: InferRequest, names: list[str], rows: int
) -> RepeatedRequest | None:
    """Return what later requests like this valid one are compared with; None: they are checked each time."""
    layouts = [_layout(tensor) for tensor in request.inputs]
    if any(output.region is not None or output.parameters for output in request.outputs):
        return None
    known = [layout for layout in layouts if layout is not None]
    if signature.has_bfloat16 or len(known) < len(layouts):
        return None
    wanted = tuple(output.name for output in request.outputs)
    return RepeatedRequest(signature, tuple(known), wanted, names, rows)


def _layout(tensor: InputTensor) -> InputLayout | None:
    dtype = None if tensor.datatype in _CHECKED else numpy_type(tensor.datatype)
    data = tensor.data
    if dtype is None or type(data) not in (bytes, memoryview) or type(tensor.shape) is not tuple:
        return None
    nbytes = memoryview(data).nbytes  # type: ignore[arg-type]
    if not 0 < nbytes <= _LARGEST:
        return None
    return InputLayout(tensor.name, tensor.datatype, tensor.shape, dtype, nbytes)
