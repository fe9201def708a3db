"""What the interpreter of ``onnx-dl run`` imports at its start, and all that makes it differ from others.

:mod:`onnx_dl.cli.run` puts this folder first on ``PYTHONPATH``, so that ``site`` finds this module in place of
the user's own ``sitecustomize``.  It takes itself out of the environment and of ``sys.path``, and imports the
user's.  What is left is a finder: the import of onnxruntime ends with :func:`onnx_dl.integrations.onnxruntime_patch.patch`.  A
program that does without onnxruntime imports nothing else of ours.

Stands alone: it needs nothing but what ``site`` itself has imported before.
"""

import os
import sys

TYPE_CHECKING = False  # not from typing, which would be imported for it
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_AT = ("onnxruntime", "onnx_dl.integrations.onnxruntime_patch")
"""Either import ends with the patch: a program that patches, too, finds ours to be the first."""


class _Finder:
    """Leaves finding to others, and has the patch follow the import of what they find; once."""

    def __init__(self, orders: str) -> None:
        self._orders = [orders]

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None", target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if fullname not in _AT:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader, fullname)
        return spec

    def _follow(self, loader: "Any", fullname: str) -> None:
        """The loader stays the one that was found, with another ``exec_module`` until it is used."""
        original = loader.exec_module

        def exec_module(module: "ModuleType") -> None:
            loader.__dict__.pop("exec_module", None)
            original(module)
            if module.__name__ == fullname:  # a zip file has one loader for all that is in it
                self._patch()

        loader.exec_module = exec_module

    def _patch(self) -> None:
        try:
            text = self._orders.pop()  # of two threads that import the two modules, one gets them
        except IndexError:
            return
        import json

        sys.meta_path.remove(self)
        orders = json.loads(text)
        _patching(orders["path"]).patch(**orders["patch"])


def _patching(path: list[str]) -> "Any":
    """Our module; where only the command knew where that is, by the command's search path."""
    try:
        import onnx_dl  # noqa: F401
    except ModuleNotFoundError:
        sys.path.extend(entry for entry in path if entry not in sys.path)
    from onnx_dl.integrations import onnxruntime_patch

    return onnxruntime_patch


def _leave() -> None:
    """As if nobody had been here: neither the program nor what it starts finds us."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if entry != here]
    sys.path_importer_cache.pop(here, None)
    os.environ.pop("PYTHONPATH", None)
    if (theirs := os.environ.pop("ONNX_DL_RUN_PYTHONPATH", None)) is not None:
        os.environ["PYTHONPATH"] = theirs


if (_orders := os.environ.pop("ONNX_DL_RUN", None)) is not None:
    _leave()
    sys.meta_path.insert(0, _Finder(_orders))
    del sys.modules["sitecustomize"]
    # The user's own.  There may be none: then this raises what site expects.
    import sitecustomize  # type: ignore[import-not-found]  # noqa: F401
