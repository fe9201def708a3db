"""``onnx-dl run``: a program as Python would run it, with :func:`onnx_dl.patch` in force."""

from __future__ import annotations

import functools
import importlib.machinery
import os
import runpy
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

from onnx_dl import patching
from onnx_dl.config import parse_size
from onnx_dl.errors import ConfigError


def prepare(
    target: Sequence[str],
    *,
    module: bool,
    settings: Sequence[str],
    memory_limit: str | None = None,
    **patch: Any,
) -> Callable[[], None]:
    """Patches, and returns what runs ``app.py args…`` or, with ``module``, ``name args…``.

    ``settings``: as :func:`onnx_dl.patching.parse_models` takes them; ``memory_limit``: of the default host.

    Raises:
        ConfigError: there is nothing to run, or a setting cannot be.
    """
    name, *arguments = target[1:] if target[:1] == ["--"] else target or [""]
    if not name:
        raise ConfigError("onnx-dl run needs a program: a path, or -m and the name of a module.")
    if not module and not os.path.exists(name):
        raise ConfigError(f"There is no file {name!r} to run.")
    if memory_limit is not None:
        # In the environment: the default host is made when it is first needed, in forked children anew.
        os.environ["ONNX_DL_MEMORY_LIMIT"] = str(parse_size(memory_limit))
    patching.patch(models=patching.parse_models(settings), **patch)
    if not sys.flags.safe_path:
        # As Python does it: the program's folder, or the present one for a module; the command's own goes.
        sys.path[0] = os.getcwd() if module else os.path.dirname(os.path.abspath(name))
    sys.argv = [name, *arguments]
    if module:
        return functools.partial(_run_module, name)
    return functools.partial(_run_file if os.path.isfile(name) else _run_path, name)


def _run_module(name: str) -> None:
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _run_path(name: str) -> None:
    """A folder with a ``__main__.py``."""
    runpy.run_path(name, run_name="__main__")


def _run_file(name: str) -> None:
    """``__file__`` is absolute and ``sys.argv[0]`` as it was given, which runpy cannot do."""
    path = os.path.abspath(name)
    code = importlib.machinery.SourceFileLoader("__main__", path).get_code("__main__")
    if code is None:
        raise ConfigError(f"{name!r} cannot be run.")
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=path, __builtins__=__builtins__, __spec__=None)
    sys.modules["__main__"] = main
    exec(code, main.__dict__)
