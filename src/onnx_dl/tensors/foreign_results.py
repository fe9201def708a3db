"""Writes results to their places in foreign memory: all of them fit, or none is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnx_dl.errors import PlaceTooSmall
from onnx_dl.tensors.block import Array
from onnx_dl.tensors.foreign import ForeignPlace, Written, as_bytes, is_only_bytes


def placed(
    names: Sequence[str], results: Sequence[object], places: Mapping[str, ForeignPlace]
) -> list[object]:
    """Writes the results that have places; returns all, with ``Written`` for these.

    A result that is not only bytes (text, a list) is returned as it is.

    Raises:
        PlaceTooSmall: a result does not fit; none was written.
        ForeignMemoryError: a place is not there any more; others may have been written.
    """
    arrays: dict[int, tuple[ForeignPlace, Array]] = {}
    for index, (name, result) in enumerate(zip(names, results, strict=True)):
        place = places.get(name)
        if place is not None and type(result) is np.ndarray and is_only_bytes(result.dtype):
            check_room(name, result.nbytes, place.nbytes)
            place.memory.check(place.offset, place.nbytes)
            arrays[index] = place, result
    returned = list(results)
    for index, (place, array) in arrays.items():
        place.memory.write(place.offset, as_bytes(np.ascontiguousarray(array)))
        returned[index] = Written(array.dtype, array.shape)
    return returned


def check_room(name: str, needed: int, available: int) -> None:
    """Raises PlaceTooSmall if a result of ``needed`` bytes does not fit."""
    if needed > available:
        raise PlaceTooSmall(
            f"Output {name!r} has {needed} bytes, and its place in shared memory has {available}.",
            output=name,
            needed=needed,
            available=available,
        )
