"""A request as the arguments of a run."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from onnx_dl.core.types import Value
from onnx_dl.server.inference import checks, inputs, memory, repeated
from onnx_dl.server.inference.checks import Signature
from onnx_dl.server.inference.inputs import MakeEmpty
from onnx_dl.server.inference.memory import RegionUses
from onnx_dl.server.inference.repeated import RepeatedRequest
from onnx_dl.server.interfaces import Served
from onnx_dl.server.shm.regions import Region
from onnx_dl.server.v2.messages import InferRequest, InputTensor, RegionSlice
from onnx_dl.session.typed_runs import BFLOAT16
from onnx_dl.tensors.foreign import ForeignPlace

MAX_BODY: Final = 1 << 30
_NONE: Final[dict[str, Any]] = {}


class Prepared(NamedTuple):
    """Arguments of one run.

    Attributes:
        signature: of the version.
        names: of the outputs to compute, in order; empty: all, whose names are not known.
        feed: a value by input name.
        rows: of the batch, or 1.
        places: where the run itself writes results, by output.
        copies: outputs that are written to their regions after the run.
        types: number of ONNX's element type by input or output, of those whose dtype does not tell (BF16).
    """

    signature: Signature
    names: list[str]
    feed: dict[str, Value]
    rows: int
    places: dict[str, ForeignPlace]
    copies: dict[str, tuple[RegionSlice, Region]]
    types: dict[str, int]


class Preparations:
    """Signatures of the versions that are served, and what turns a request into the arguments of a run.
    Thread-safe."""

    def __init__(self, make_empty: MakeEmpty, max_body: int = MAX_BODY) -> None:
        """``max_body``: bytes of an input in a region that this process reads itself, as it does a body."""
        self._make_empty = make_empty
        self._max_body = max_body
        self._signatures: dict[tuple[str, str], Signature] = {}
        self._last: dict[tuple[str, str], RepeatedRequest | None] = {}

    def prepare(self, entry: Served, request: InferRequest, uses: RegionUses | None) -> Prepared:
        """Check a request and return the arguments of its run.

        Args:
            uses: gets the regions that the request names; the caller ends them after the run.  None: it names
                none.

        Raises:
            RequestFailure: 400: the request is not valid; 404: there is no such region; 403: there are none.
        """
        key = entry.name, entry.version
        last = self._last.get(key)
        if last is not None and last.signature.entry is entry and (found := last.feed(request)) is not None:
            checks.check_forms(last.signature, request)
            return Prepared(last.signature, last.names, found, last.rows, _NONE, _NONE, _NONE)
        signature = self.signature(entry)
        rows = checks.check_inputs(signature, request.inputs)
        names = checks.check_outputs(signature, request.outputs)
        checks.check_forms(signature, request)
        feed: dict[str, Value] = {}
        types: dict[str, int] = {}
        for tensor in request.inputs:
            feed[tensor.name] = self._value(tensor, uses)
            if tensor.datatype == "BF16":
                types[tensor.name] = BFLOAT16
        if signature.has_bfloat16:
            types |= {name: BFLOAT16 for name in names if signature.outputs[name].datatype == "BF16"}
        prepared = Prepared(signature, names, feed, rows, {}, {}, types)
        for output in request.outputs:
            if output.region is not None and uses is not None:
                _find_place(prepared, output.name, output.region, uses)
        self._last[key] = repeated.remembered(signature, request, names, rows)
        return prepared

    def signature(self, entry: Served) -> Signature:
        """Return the signature of a version, which is made once for each content of it."""
        key = entry.name, entry.version
        known = self._signatures.get(key)
        if known is None or known.entry is not entry:
            known = self._signatures[key] = Signature(entry)
        return known

    def _value(self, tensor: InputTensor, uses: RegionUses | None) -> Value:
        data = tensor.data
        if type(data) is memoryview or type(data) is bytes:
            return inputs.binary(tensor, data, self._make_empty)
        if type(data) is list:
            return inputs.from_json(tensor, data)
        if isinstance(data, RegionSlice) and uses is not None:
            return memory.input_value(
                tensor, data, uses.region(data.region), self._make_empty, self._max_body
            )
        raise inputs.unreadable(tensor)


def _find_place(prepared: Prepared, name: str, where: RegionSlice, uses: RegionUses) -> None:
    region = uses.region(where.region)
    info = prepared.signature.outputs.get(name)
    # A run with types that numpy lacks takes no places.
    datatype = None if info is None or prepared.types else info.datatype
    if (place := memory.output_place(datatype, where, region)) is None:
        prepared.copies[name] = where, region
    else:
        prepared.places[name] = place
