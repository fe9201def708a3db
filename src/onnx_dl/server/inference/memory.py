"""Tensors that lie in regions of clients' shared memory: inputs, and the places of outputs.

What is nothing but its bytes goes to the worker as a descriptor.  Text, and types that numpy lacks, are read
and written by this process.
"""

from __future__ import annotations

import contextlib
from typing import Final

import numpy as np

from onnx_dl.core.types import Value
from onnx_dl.server.inference import inputs
from onnx_dl.server.inference.checks import check_known, element_count
from onnx_dl.server.inference.inputs import MakeEmpty
from onnx_dl.server.shm.regions import Region, Regions
from onnx_dl.server.v2 import datatypes, text
from onnx_dl.server.v2.datatypes import BYTES
from onnx_dl.server.v2.failures import internal, invalid, too_large
from onnx_dl.server.v2.messages import InputTensor, OutputTensor, RegionSlice
from onnx_dl.tensors.foreign import ForeignPlace, as_bytes

_HERE: Final = frozenset((BYTES, "BF16"))
"""Datatypes whose tensors this process reads and writes."""


class RegionUses:
    """The regions that one request uses: they stay open until :meth:`end`."""

    __slots__ = ("_regions", "_stack")

    def __init__(self, regions: Regions) -> None:
        self._regions = regions
        self._stack: contextlib.ExitStack | None = None

    def region(self, name: str) -> Region:
        """Return a region that is used from now on.  Raises RequestFailure (404, 403)."""
        if self._stack is None:
            self._stack = contextlib.ExitStack()
        return self._stack.enter_context(self._regions.find(name))

    def end(self) -> None:
        """End the use of all of them."""
        if self._stack is not None:
            self._stack.close()


def input_value(
    tensor: InputTensor, where: RegionSlice, region: Region, make_empty: MakeEmpty, most: int
) -> Value:
    """Return the value of an input in a region.

    ``most``: bytes of an input that this process reads itself.

    Raises:
        RequestFailure: 400: the region does not have these bytes, or they are no such tensor.  413: there are
            more than ``most``, or than there may be in flight.  429: too many are in flight.
    """
    _check_size(tensor, where)
    dtype = None if tensor.datatype in _HERE else datatypes.to_numpy(tensor.datatype)
    if dtype is None:
        if where.nbytes > most:
            raise too_large(
                f"input '{tensor.name}' of {tensor.datatype} has {where.nbytes} bytes of region "
                f"'{where.region}', and the most is {most}"
            )

        def allocate(nbytes: int) -> memoryview:
            return make_empty(nbytes).data if nbytes else memoryview(b"")

        return inputs.binary(tensor, region.read(where.offset, where.nbytes, allocate), make_empty)
    if not where.nbytes:
        region.check(where.offset, 0)
        return np.empty(tensor.shape, dtype)
    return region.array(where.offset, dtype, tensor.shape)


def _check_size(tensor: InputTensor, where: RegionSlice) -> None:
    """Raise RequestFailure (400) if a tensor of this shape does not have so many bytes."""
    check_known(tensor.name, tensor.datatype)
    count = element_count(tensor.shape)
    if tensor.datatype == BYTES:
        wanted, fits = f"at least {4 * count}", 4 * count <= where.nbytes
    else:
        size = count * datatypes.SIZES[tensor.datatype]
        wanted, fits = str(size), size == where.nbytes
    if not fits:
        raise invalid(
            f"input byte size mismatch for input '{tensor.name}'. Expected {wanted} bytes for shape "
            f"{list(tensor.shape)} of {tensor.datatype}, got {where.nbytes} bytes of region '{where.region}'"
        )


def output_place(datatype: str | None, where: RegionSlice, region: Region) -> ForeignPlace | None:
    """Return the place of an output that the run itself writes; None: :func:`write` does that.

    ``datatype``: None: it is not known.  Raises RequestFailure (400) if the region does not have the place.
    """
    region.check(where.offset, where.nbytes)
    if datatype is None or datatype in _HERE:
        return None
    return region.place(where.offset, where.nbytes)


def write(tensor: OutputTensor, where: RegionSlice, region: Region) -> OutputTensor:
    """Write an output into its region.  Return it as one that lies there.

    Raises:
        RequestFailure: 400: it does not fit, or the region is not there any more; 500: a text is too long.
    """
    assert tensor.array is not None
    if tensor.datatype == BYTES:
        try:
            data = memoryview(text.encode(tensor.array))
        except OverflowError as error:
            raise internal(f"output '{tensor.name}': {error}") from None
    else:
        data = as_bytes(tensor.array)
    region.write(where.offset, where.nbytes, tensor.name, data)
    return OutputTensor(tensor.name, tensor.datatype, tensor.shape, None, where)
