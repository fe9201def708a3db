"""Loads a model that was given as bytes, without a copy of them.

onnxruntime copies bytes before it reads them, and so does Python; a file is read piece by piece.  The bytes
lie in memory that has a path under /proc.  They are copied where a path could change the meaning (files
beside the model, formats known by the file name, names in profiles), and where there is no /proc.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

import msgspec

from onnx_dl.core import model_files
from onnx_dl.core.spec import ModelSpec
from onnx_dl.tensors import segment
from onnx_dl.workers.engines.ort_session import LoadedSession

_PROVIDERS: Final = ("CPUExecutionProvider", "CUDAExecutionProvider")
"""Providers that do not use the path of a model."""
_ABOUT_FILES: Final = ("compile", "context", "external", "file", "folder", "format", "ort_model")
"""Parts of the names of session config entries that onnxruntime combines with the path."""


def load_from_memory(spec: ModelSpec, blob: int, memory: Callable[[], int | None]) -> LoadedSession:
    """Loads a model that lies in the memory of a descriptor.

    Args:
        memory: makes a descriptor of the arrays that the options name, for each attempt.

    Raises:
        Exception: what onnxruntime raises for bytes.
    """
    path = segment.path_of(blob)
    if is_like_a_file(spec) and _is_plain(blob) and _is_there(path, blob):
        try:
            return LoadedSession(msgspec.structs.replace(spec, path=path, blob=None), None, memory())
        except Exception as error:
            if path not in str(error):  # else it is an error of reading a file; for bytes its text differs
                raise
    return LoadedSession(spec, segment.thaw(blob), memory())


def is_like_a_file(spec: ModelSpec) -> bool:
    """Tells whether options and providers mean the same for bytes and for a file with them."""
    options = spec.options or {}
    return (
        not any(part in key for key in options.get("config", {}) for part in _ABOUT_FILES)
        and not any("provider" in name for name, *_ in options.get("calls", []))
        and not options.get("enable_profiling")
        and not options.get("optimized_model_filepath")
        and set(spec.extra) <= {"enable_fallback", "tuple"}
        and not spec.surroundings.get("environment")  # ORT_LOAD_CONFIG_FROM_MODEL
        and {*spec.provider_names} <= set(_PROVIDERS)
    )


def _is_plain(blob: int) -> bool:
    """Tells whether it is an ONNX model without external data."""
    try:
        return not model_files.external_files(blob)
    except (OSError, ValueError):
        return False


def _is_there(path: str, blob: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(blob))
    except OSError:  # /proc is missing or incomplete
        return False
