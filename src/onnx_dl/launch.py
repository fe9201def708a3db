"""``onnx-dl run``: a program as Python would run it, with :func:`onnx_dl.patch` in force."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from typing import Any

from onnx_dl import patching
from onnx_dl.errors import ConfigError


def run(target: Sequence[str], *, module: bool, settings: Sequence[str], **patch: Any) -> None:
    """Runs ``app.py args…`` or, with ``module``, ``name args…``; returns when it ends.

    ``settings``: as :func:`onnx_dl.patching.parse_models` takes them.

    Raises:
        ConfigError: there is nothing to run, or a setting cannot be.
        Exception: what the program raises, SystemExit included.
    """
    if not target:
        raise ConfigError("onnx-dl run needs a program: a path, or -m and the name of a module.")
    name, *arguments = target
    if not module and not os.path.exists(name):
        raise ConfigError(f"There is no file {name!r} to run.")
    patching.patch(models=patching.parse_models(settings), **patch)
    # As Python does it: the program's folder, or the present one for a module, in place of the command's own.
    sys.path[0] = os.getcwd() if module else os.path.dirname(os.path.abspath(name))
    sys.argv = [name, *arguments]
    if module:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(name, run_name="__main__")
