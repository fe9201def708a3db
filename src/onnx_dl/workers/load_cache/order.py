"""Order for the saver: the model to save in the load cache."""

from __future__ import annotations

import msgspec

from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import ModelDescription


class SaveOrder(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is worth saving; sent as JSON from the worker to :mod:`onnx_dl.workers.saver`."""

    key: str
    onnxruntime: str
    """Version and build."""
    spec: ModelSpec
    description: ModelDescription
    nbytes: int
    """Size of the model's files, or of its bytes."""
