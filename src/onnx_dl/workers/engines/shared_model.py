"""A model that was given as bytes, loaded without a copy of them.

onnxruntime copies bytes before it reads them, and so does Python; a file it reads piece by piece.  The bytes
lie in memory that has a path, under /proc.  Where a path could mean something else than bytes (files beside
the model, forms that onnxruntime tells by a name, what a profile says), and where there is no /proc, they are
copied.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

import msgspec

from onnx_dl.core import model_files
from onnx_dl.core.spec import ModelSpec
from onnx_dl.tensors import segment
from onnx_dl.workers.engines.ort_session import Opened

_PROVIDERS: Final = ("CPUExecutionProvider", "CUDAExecutionProvider")
"""Those that do not ask where a model lies."""
_ABOUT_FILES: Final = ("compile", "context", "external", "file", "folder", "format", "ort_model")
"""Parts of names of session config entries that onnxruntime heeds together with a path."""


def opened(spec: ModelSpec, blob: int, memory: Callable[[], int | None]) -> Opened:
    """The session of a model that lies in the memory of a descriptor.

    Args:
        memory: makes a descriptor of the arrays that the options name, for each try.

    Raises:
        Exception: what onnxruntime raises for bytes.
    """
    path = segment.path_of(blob)
    if is_like_a_file(spec) and _is_plain(blob) and _is_there(path, blob):
        try:
            return Opened(msgspec.structs.replace(spec, path=path, blob=None), None, memory())
        except Exception as error:
            if path not in str(error):  # else it was refused when it was read, in other words than bytes are
                raise
    return Opened(spec, segment.thaw(blob), memory())


def is_like_a_file(spec: ModelSpec) -> bool:
    """Whether options and providers mean the same for bytes and for a file with them."""
    options = spec.options or {}
    providers = {item[0] if isinstance(item, list) else item for item in spec.providers or []}
    return (
        not any(part in key for key in options.get("config", {}) for part in _ABOUT_FILES)
        and not any("provider" in name for name, *_ in options.get("calls", []))
        and not options.get("enable_profiling")
        and not options.get("optimized_model_filepath")
        and set(spec.extra) <= {"enable_fallback", "tuple"}
        and not spec.surroundings.get("environment")  # ORT_LOAD_CONFIG_FROM_MODEL
        and providers <= set(_PROVIDERS)
    )


def _is_plain(blob: int) -> bool:
    """Whether it is an ONNX model without files beside it."""
    try:
        return not model_files.external_files(blob)
    except (OSError, ValueError):
        return False


def _is_there(path: str, blob: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(blob))
    except OSError:  # no /proc, or not a whole one
        return False
