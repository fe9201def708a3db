"""Warm-ups of a configuration: feeds for a model that has just been loaded.

Warm-ups run at the loads that the server makes itself.  One that a request has caused runs with that request.
"""

from __future__ import annotations

import math
import os
import struct
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from onnx_dl.server.interfaces import Served
from onnx_dl.server.v2 import datatypes
from onnx_dl.system import small_files

FOLDER: Final = "warmup"
"""The folder, beside the versions, in which files of inputs are."""
_MOST_BYTES: Final = 1 << 30
MOST_RUNS: Final = 1000
"""Runs of one warm-up."""


def feed_of(given: dict[str, Any], entry: Served) -> dict[str, NDArray[Any]]:
    """The inputs of one warm-up.

    Args:
        given: a ``model_warmup`` in Triton's JSON form.
        entry: the version that is warmed up.

    Raises:
        ValueError: an input cannot be made; the message names it.
        OSError: a file cannot be read.
    """
    folder = os.path.join(os.path.dirname(os.path.dirname(entry.path)), FOLDER)
    batch = (max(1, given.get("batch_size", 0)),) if entry.max_batch_size else ()
    return {name: _array(name, each, batch, folder) for name, each in given["inputs"].items()}


def runs_of(given: dict[str, Any]) -> int:
    """Number of runs of a warm-up."""
    count: int = given.get("count", 0)
    return min(MOST_RUNS, max(1, count))


def _array(name: str, given: dict[str, Any], batch: tuple[int, ...], folder: str) -> NDArray[Any]:
    kind = given["data_type"].removeprefix("TYPE_")
    datatype = datatypes.BYTES if kind == "STRING" else kind
    shape = (*batch, *given.get("dims", ()))
    items = math.prod(shape)
    if items * datatypes.SIZES.get(datatype, 4) > _MOST_BYTES:
        raise ValueError(f"the warm-up input '{name}' has more than {_MOST_BYTES} bytes")
    if file := given.get("input_data_file"):
        return _of_file(name, os.path.join(folder, file), datatype, shape)
    if datatype == datatypes.BYTES:
        return np.full(shape, "" if given.get("zero_data") else "warm", object)
    dtype = datatypes.to_numpy(datatype)
    if dtype is None:
        raise ValueError(f"the warm-up input '{name}' is {datatype}, which a warm-up cannot make")
    if given.get("zero_data"):
        return np.zeros(shape, dtype)
    rng = np.random.default_rng(0)
    if dtype.kind == "f":
        return rng.random(shape, np.float32).astype(dtype)
    return rng.integers(0, 2 if dtype.kind == "b" else 100, shape).astype(dtype)


def _of_file(name: str, path: str, datatype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """An input in the protocol's binary form."""
    if os.path.realpath(path) != os.path.join(
        os.path.realpath(os.path.dirname(path)), os.path.basename(path)
    ):
        raise ValueError(f"the warm-up input '{name}': {path} is a link, which may lead anywhere")
    data = small_files.read(path, _MOST_BYTES)
    items = math.prod(shape)
    if datatype == datatypes.BYTES:
        texts = _texts(name, data)
        if len(texts) != items:
            raise ValueError(f"the warm-up input '{name}': {path} has {len(texts)} texts, not {items}")
        array = np.empty(items, object)
        array[:] = texts
        return array.reshape(shape)
    dtype = datatypes.to_numpy(datatype)
    if dtype is None:
        raise ValueError(f"the warm-up input '{name}' is {datatype}, which a warm-up cannot make")
    if len(data) != items * dtype.itemsize:
        raise ValueError(
            f"the warm-up input '{name}': {path} has {len(data)} bytes, not {items * dtype.itemsize}"
        )
    return np.frombuffer(data, dtype).reshape(shape)


def _texts(name: str, data: bytes) -> list[str]:
    """Texts, each after its length."""
    found, at = [], 0
    while at < len(data):
        if at + 4 > len(data):
            raise ValueError(f"the warm-up input '{name}' ends within a length")
        (length,) = struct.unpack_from("<I", data, at)
        at += 4 + length
        if at > len(data):
            raise ValueError(f"the warm-up input '{name}' ends within a text")
        found.append(data[at - length : at].decode())
    return found
