"""The module that the interpreter of ``onnx-dl run`` imports at its start.

:mod:`onnx_dl.cli.run` puts this folder first on ``PYTHONPATH``, so that ``site`` imports this module instead
of the user's own ``sitecustomize``.  It removes itself from the environment and from ``sys.path``, and
imports the user's.  A finder remains: it calls :func:`onnx_dl.patch` at the end of the import of onnxruntime.
A program without onnxruntime imports nothing else of onnx-dl.

Uses only modules that ``site`` has imported before.
"""

import os
import sys

TYPE_CHECKING = False  # not from typing: that would import typing
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_AT = ("onnxruntime", "onnx_dl.integrations.onnxruntime_patch")
"""Modules whose import ends with the patch.  So a program's own call of patch() comes after ours."""


class _Finder:
    """Lets other finders find the modules, and applies the patch once, after the import of either."""

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
        """Replaces ``exec_module`` of the loader for one call; the loader itself stays."""
        original = loader.exec_module

        def exec_module(module: "ModuleType") -> None:
            loader.__dict__.pop("exec_module", None)
            original(module)
            if module.__name__ == fullname:  # a zip file has one loader for all its modules
                self._patch()

        loader.exec_module = exec_module

    def _patch(self) -> None:
        try:
            text = self._orders.pop()  # two threads may import the two modules: one patches
        except IndexError:
            return
        import json

        sys.meta_path.remove(self)
        orders = json.loads(text)
        _patching(orders["path"]).patch(**orders["patch"])


def _patching(path: list[str]) -> "Any":
    """Imports our module; from the search path of the command if it is not on the program's."""
    try:
        import onnx_dl  # noqa: F401
    except ModuleNotFoundError:
        sys.path.extend(entry for entry in path if entry not in sys.path)
    from onnx_dl.integrations import onnxruntime_patch

    return onnxruntime_patch


def _leave() -> None:
    """Removes all traces: neither the program nor its child processes find this module."""
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
    # The user's own.  If there is none, this raises the ImportError that site expects.
    import sitecustomize  # type: ignore[import-not-found]  # noqa: F401
