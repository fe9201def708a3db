"""Loading a model from files that somebody may replace meanwhile, so that what is said of them is true.

Each file is looked at before the load and after it.  If one has changed in between, the model was read from
neither the one nor the other, and is loaded once more.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any, Final, TypeVar

from onnx_dl.core import file_identity, model_files
from onnx_dl.core.file_identity import ReadFile
from onnx_dl.core.spec import ModelSpec
from onnx_dl.errors import FilesChanging

_TRIES: Final = 3
_LIBRARY_CALL: Final = "register_custom_ops_library"

_T = TypeVar("_T")


def names_of(spec: ModelSpec, blob: int | None = None) -> list[str]:
    """Names of all files that onnxruntime reads for a model: its own, external data, libraries.

    ``blob``: descriptor of the model, if it is given as bytes.
    """
    beside: list[str] = []
    model = spec.where("") if blob is None else blob
    with contextlib.suppress(OSError, ValueError):  # what is wrong with it, its load will say
        beside = model_files.external_files(model)
    return [*([""] if blob is None else []), *beside, *_libraries(spec)]


def _libraries(spec: ModelSpec) -> list[str]:
    """Those of custom operators and of execution providers.  One without a folder is the system's to find."""
    calls: list[Any] = (spec.options or {}).get("calls", [])
    named = [
        arg for name, args, kwargs in calls if name == _LIBRARY_CALL for arg in (*args, *kwargs.values())
    ]
    found = [*named, *spec.surroundings.get("libraries", {}).values()]
    return [path for path in found if isinstance(path, str) and os.path.isabs(path)]


def load(
    spec: ModelSpec, names: Callable[[], list[str]], make: Callable[[], _T]
) -> tuple[_T, list[ReadFile]]:
    """What ``make`` makes of the model, and the files that it was made of.

    Args:
        names: of all files that ``make`` reads; asked for before each try.

    Raises:
        FilesChanging: they changed each time.
        Exception: what ``make`` raised.
    """
    for _ in range(_TRIES):
        read = file_identity.look_at(spec.where, names())
        try:
            made = make()
        except Exception:  # of half of the old files and half of the new ones, perhaps
            if (path := file_identity.changed(spec.where, read)) is None:
                raise
        else:
            if (path := file_identity.changed(spec.where, read)) is None:
                return made, read
            del made
    raise FilesChanging(
        f"{path} was changed while {spec.name} was loaded, {_TRIES} times in a row. Load it when "
        "it is written, or write it under another name and rename it then."
    )
