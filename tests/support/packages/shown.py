"""What the programs of this folder have in common: they print what came out, and where their models lived."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np


def show(work: Callable[[], tuple[Any, Any]]) -> None:
    """Does the work, after ``onnx_dl.patch()`` if the command line says so, and prints one line of JSON.

    ``work`` returns its results and what holds the sessions, whose models unload when nobody has them.
    """
    if "--patch" in sys.argv:
        import onnx_dl

        onnx_dl.patch(ttl=60)
    result, _holder = work()
    digest = hashlib.sha256()
    _add(digest, result)
    told: dict[str, Any] = {"digest": digest.hexdigest(), "result": repr(result)[:2000]}
    if "onnx_dl.integrations.onnxruntime_patch" in sys.modules:
        import onnx_dl

        models = onnx_dl.default_host().snapshot().models
        told["in process"] = [str(session) for session in onnx_dl.unpatched_report()]
        told["in workers"] = len([model for model in models if model.pid is not None and model.isolated])
    print(json.dumps(told))


def _add(digest: Any, value: Any) -> None:
    """Every bit of arrays, and how many there are of everything."""
    if hasattr(value, "detach"):  # of torch
        value = value.detach().numpy()
    if isinstance(value, np.ndarray | np.generic):
        digest.update(f"{value.dtype.str}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, list | tuple):
        digest.update(f"{type(value).__name__}{len(value)}".encode())
        for item in value:
            _add(digest, item)
    elif isinstance(value, dict):
        _add(digest, list(value.items()))
    else:
        digest.update(repr(value).encode())
