"""Loads a model from files that may be replaced meanwhile, so that its description is true.

Each file is looked at before and after the load.  If one has changed, the model may be a mixture of old and
new files, and is loaded once more.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Final, TypeVar

from onnx_dl.core import file_identity, model_files
from onnx_dl.core.file_identity import ReadFile
from onnx_dl.core.spec import ModelSpec
from onnx_dl.errors import FilesChanging

_ATTEMPTS: Final = 3

_T = TypeVar("_T")


def names_of(spec: ModelSpec, blob: int | None = None) -> list[str]:
    """Returns the names of all files that onnxruntime reads for a model: its own, external data, libraries.

    ``blob``: descriptor of the model, if it is given as bytes.
    """
    beside: list[str] = []
    model = spec.where("") if blob is None else blob
    with contextlib.suppress(OSError, ValueError):  # the load raises the proper error
        beside = model_files.external_files(model)
    return [*([""] if blob is None else []), *beside, *_libraries(spec)]


def _libraries(spec: ModelSpec) -> list[str]:
    """Returns paths of operator and provider libraries, without those that the system's loader finds."""
    named = [
        arg
        for name, args, kwargs in (spec.options or {}).get("calls", [])
        if name == "register_custom_ops_library"
        for arg in (*args, *kwargs.values())
    ]
    found = [*named, *spec.surroundings.get("libraries", {}).values()]
    return [path for path in found if isinstance(path, str) and os.path.isabs(path)]


def load(
    spec: ModelSpec, names: Callable[[], list[str]], make: Callable[[], _T]
) -> tuple[_T, list[ReadFile]]:
    """Returns the result of ``make``, and the files that it was made of.

    Args:
        names: returns the names of all files that ``make`` reads; called before each attempt.

    Raises:
        FilesChanging: they changed at each attempt.
        Exception: what ``make`` raised.
    """
    for _ in range(_ATTEMPTS):
        read = file_identity.look_at(spec.where, names())
        try:
            made = make()
        except Exception:  # perhaps because it read old and new files
            if (path := file_identity.changed(spec.where, read)) is None:
                raise
        else:
            if (path := file_identity.changed(spec.where, read)) is None:
                return made, read
            del made
    raise FilesChanging(
        f"{path} was changed while {spec.name} was loaded, {_ATTEMPTS} times in a row. Load it after "
        "it is written, or write it under another name and then rename it."
    )
