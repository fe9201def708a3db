"""One inference, as plain data that both protocols make and read."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from numpy.typing import NDArray


class RegionSlice(NamedTuple):
    """Part of a registered region of shared memory.  ``offset`` counts from the region's begin."""

    region: str
    offset: int
    nbytes: int


@dataclasses.dataclass(slots=True)
class InputTensor:
    """One input as it was sent.

    ``data`` is one of: bytes in the protocol's binary form (a buffer, which may lie in an arena block); a
    list (JSON, nested or flat); the slice of a region.  The shape is as it was sent: unchecked.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: memoryview | bytes | list[Any] | RegionSlice
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class RequestedOutput:
    """One output that a request names."""

    name: str
    region: RegionSlice | None = None
    is_binary: bool = False
    """HTTP: the client wants the bytes behind the JSON."""
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class InferRequest:
    """``version`` empty: the newest.  ``outputs`` empty: all.  ``timeout``: seconds that are left to the
    caller, waiting included; None: no limit.  ``nbytes``: bytes of the whole request, for the limit of bytes
    in flight."""

    model: str
    version: str
    id: str
    inputs: list[InputTensor]
    outputs: list[RequestedOutput]
    parameters: dict[str, Any]
    timeout: float | None = None
    nbytes: int = 0
    is_binary: bool = True
    """Outputs that ``outputs`` does not name go back as bytes, not as JSON."""


@dataclasses.dataclass(slots=True)
class OutputTensor:
    """One output.  ``array`` is C-contiguous; of BYTES an object array of ``bytes`` or ``str``; of BF16 an
    array of uint16.  None: the bytes are in the client's ``region``."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    array: NDArray[Any] | None
    region: RegionSlice | None = None


@dataclasses.dataclass(slots=True)
class InferResponse:
    """``version`` is the one that ran."""

    model: str
    version: str
    id: str
    outputs: list[OutputTensor]
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
