"""``onnx-dl run``: a program in a Python of its own, with :func:`onnx_dl.patch` in force.

The command becomes that Python (``exec``), with the command line that it would have without us.  So nothing
of how Python runs a program is done here; what is ours is in :mod:`onnx_dl.hook.sitecustomize`.
"""

from __future__ import annotations

import collections
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, NoReturn

from onnx_dl.core.parsing import parse_size
from onnx_dl.errors import ConfigError
from onnx_dl.integrations.patch_settings import checked, parse_models
from onnx_dl.system import process_setup

HOOK: Final = os.path.join(os.path.dirname(os.path.abspath(__file__)), "hook")
_OWN_FLAGS: Final = ("-h", "--help", "--lazy")
_OPTION: Final = re.compile(
    r"-(?=.)([bBdEhiIOPqRsStuvVx?]*)(?:([WX]|-check-hash-based-pycs)(.*)|([cm]).*)?", re.DOTALL
)
"""One word of Python's options: flags, and then one with a value, or ``-c`` or ``-m``, where options end."""
_COERCED: Final = ("C.UTF-8", "C.utf8", "UTF-8")
_DEAF: Final = {"-E", "-I", "-S"}
"""Under these Python does not read PYTHONPATH, or does without ``site``."""


class Replacement(NamedTuple):
    """A program that takes this process's place."""

    python: str
    arguments: list[str]
    environ: dict[str, str]

    def take_over(self) -> NoReturn:
        """Ends the present program without a word; the process goes on.

        Raises:
            OSError: the interpreter cannot be started.
        """
        os.execve(self.python, self.arguments, self.environ)


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """``run`` and its own options, which are long; and what stands behind them, which is for Python."""
    at = 1
    while at < len(words) and (words[at] in _OWN_FLAGS or words[at].startswith("--")) and words[at] != "--":
        at += 1 if words[at] in _OWN_FLAGS or "=" in words[at] else 2
    return list(words[:at]), list(words[at:])


def prepare(
    command: Sequence[str],
    *,
    settings: Sequence[str] = (),
    memory_limit: str | None = None,
    environ: Mapping[str, str] = os.environ,
    **patch: Any,
) -> Replacement:
    """What runs ``python command…`` patched, under the options that the present interpreter has.

    ``settings``: as :func:`onnx_dl.integrations.patch_settings.parse_models` takes them; ``memory_limit``: of the default
    host; ``patch``: arguments of :func:`onnx_dl.patch`.

    Raises:
        ConfigError: there is nothing to run, a setting cannot be, or Python would not listen to us.
    """
    if not command:
        raise ConfigError("onnx-dl run needs a program: a path, -m and the name of a module, or -c and code.")
    options = python_options(sys.orig_argv[1:])
    _check_reachable([*options, *python_options(command)])
    changed = uncoerced(environ, utf8_mode=bool(sys.flags.utf8_mode))
    if memory_limit is not None:
        # In the environment: the default host is made when it is first needed, in forked children anew.
        changed["ONNX_DL_MEMORY_LIMIT"] = str(parse_size(memory_limit))
    orders = {"path": process_setup.search_path(), "patch": _checked(settings, patch)}
    return Replacement(
        sys.executable, [sys.executable, *options, *command], hooked(changed, json.dumps(orders))
    )


def hooked(environ: Mapping[str, str], orders: str) -> dict[str, str]:
    """An environment in which Python finds our hook first, and the hook what it put aside."""
    theirs = environ.get("PYTHONPATH")
    changed = {**environ, "ONNX_DL_RUN": orders, "PYTHONPATH": os.pathsep.join(filter(None, (HOOK, theirs)))}
    return changed if theirs is None else {**changed, "ONNX_DL_RUN_PYTHONPATH": theirs}


def uncoerced(environ: Mapping[str, str], *, utf8_mode: bool) -> dict[str, str]:
    """The environment as it was before Python changed ``LC_CTYPE`` in it (PEP 538), where it did.

    It is what the next Python sees: from ``C`` that makes the same as this one did, UTF-8 mode included.
    """
    coerced = utf8_mode and not environ.get("LC_ALL") and environ.get("PYTHONCOERCECLOCALE") != "0"
    if coerced and environ.get("LC_CTYPE") in _COERCED:
        return {**environ, "LC_CTYPE": "C"}
    return dict(environ)


def python_options(words: Sequence[str]) -> list[str]:
    """Python's own options at the beginning of its command line, without the program."""
    found: list[str] = []
    left = collections.deque(words)
    while left and (match := _OPTION.fullmatch(left[0])) is not None:
        left.popleft()
        flags, valued, value, program = match.groups()
        found += [f"-{flag}" for flag in flags]
        if valued:
            found += [f"-{valued}", value or (left.popleft() if left else "")]
        if program:
            break
    return found


def _check_reachable(options: Sequence[str]) -> None:
    if deaf := _DEAF.intersection(options):
        raise ConfigError(
            f"Python's option {' '.join(sorted(deaf))} keeps onnx-dl run out of the program. Leave it out, "
            "or call onnx_dl.patch() in the program."
        )
    if not sys.executable or os.pathsep in HOOK:
        raise ConfigError(
            f"onnx-dl run starts Python ({sys.executable!r}) with {HOOK!r} on its search path, and cannot. "
            "Call onnx_dl.patch() in the program."
        )


def _checked(settings: Sequence[str], patch: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of :func:`onnx_dl.patch`, of which it is known now that it takes them."""
    models = parse_models(settings)
    return checked(patch, "onnx-dl run") | {
        "models": {glob: checked(more, glob) for glob, more in models.items()}
    }
