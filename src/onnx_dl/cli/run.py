"""``onnx-dl run``: runs a Python program with :func:`onnx_dl.patch` in effect.

The command replaces itself by Python (``exec``), with the command line that the program would have without
onnx-dl.  So Python itself runs the program; our part is in :mod:`onnx_dl.cli.hook.sitecustomize`.
"""

from __future__ import annotations

import collections
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, NoReturn

from onnx_dl.core.parsing import parse_size
from onnx_dl.errors import ConfigError
from onnx_dl.integrations.patch_settings import checked, parse_models
from onnx_dl.system import process_setup

HOOK: Final = os.path.join(os.path.dirname(os.path.abspath(__file__)), "hook")
_OWN_FLAGS: Final = ("-h", "--help", "--lazy")
_OPTION: Final = re.compile(
    r"-(?=.)([bBdEhiIOPqRsStuvVx?]*)(?:([WX]|-check-hash-based-pycs)(.*)|([cm]).*)?", re.DOTALL
)
"""One word of Python options: flags, then an option with a value, or ``-c`` or ``-m``, which end options."""
_COERCED: Final = ("C.UTF-8", "C.utf8", "UTF-8")
_NO_HOOK: Final = {"-E", "-I", "-S"}
"""Options with which Python ignores PYTHONPATH, or does not import ``site``."""


class Replacement(NamedTuple):
    """A program that replaces this process."""

    python: str
    arguments: list[str]
    environ: dict[str, str]

    def take_over(self) -> NoReturn:
        """Executes the program in this process (``exec``).

        Raises:
            OSError: the interpreter cannot be started.
        """
        os.execve(self.python, self.arguments, self.environ)


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits the words into ``run`` with its own options, which are all long, and the words for Python."""
    at = 1
    while at < len(words) and (words[at] in _OWN_FLAGS or words[at].startswith("--")) and words[at] != "--":
        at += 1 if words[at] in _OWN_FLAGS or "=" in words[at] else 2
    return list(words[:at]), list(words[at:])


def prepare(
    command: Sequence[str],
    *,
    settings: Sequence[str] = (),
    memory_limit: str | None = None,
    host: str | None = None,
    environ: Mapping[str, str] = os.environ,
    **patch: object,
) -> Replacement:
    """The program that runs ``python command…`` patched, with the options of the present interpreter.

    ``settings``: in the form ``GLOB:NAME=VALUE``; ``memory_limit``: of the default host; ``host``: name of
    a shared host that becomes the default host; ``patch``: arguments of :func:`onnx_dl.patch`.

    Raises:
        ConfigError: there is no program, a setting is not valid, or Python would ignore our hook.
    """
    if not command:
        raise ConfigError(
            "run needs a program: a file, -m MODULE, -c CODE, or - for standard input. For example: "
            "onnx-dl run app.py"
        )
    options = python_options(sys.orig_argv[1:])
    _check_reachable([*options, *python_options(command)])
    changed = uncoerced(environ, utf8_mode=bool(sys.flags.utf8_mode))
    if memory_limit is not None:
        # By the environment: the default host is made at its first use, and again in forked children.
        changed["ONNX_DL_MEMORY_LIMIT"] = str(parse_size(memory_limit))
    if host is not None:
        changed["ONNX_DL_HOST"] = host
    orders = {"path": process_setup.search_path(), "patch": _checked(settings, patch)}
    return Replacement(
        sys.executable, [sys.executable, *options, *command], hooked(changed, json.dumps(orders))
    )


def hooked(environ: Mapping[str, str], orders: str) -> dict[str, str]:
    """An environment in which Python imports our hook, which finds there what to restore."""
    theirs = environ.get("PYTHONPATH")
    changed = {**environ, "ONNX_DL_RUN": orders, "PYTHONPATH": os.pathsep.join(filter(None, (HOOK, theirs)))}
    return changed if theirs is None else {**changed, "ONNX_DL_RUN_PYTHONPATH": theirs}


def uncoerced(environ: Mapping[str, str], *, utf8_mode: bool) -> dict[str, str]:
    """The environment with ``LC_CTYPE`` as it was before Python changed it (PEP 538).

    From ``C``, the next Python makes the same changes again, including UTF-8 mode.
    """
    coerced = utf8_mode and not environ.get("LC_ALL") and environ.get("PYTHONCOERCECLOCALE") != "0"
    if coerced and environ.get("LC_CTYPE") in _COERCED:
        return {**environ, "LC_CTYPE": "C"}
    return dict(environ)


def python_options(words: Sequence[str]) -> list[str]:
    """The options of Python at the beginning of its command line, without the program."""
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
    if blocking := _NO_HOOK.intersection(options):
        raise ConfigError(
            f"onnx-dl run does not work with Python's option {' '.join(sorted(blocking))}. Leave it out, or "
            "call onnx_dl.patch() in the program."
        )
    if not sys.executable or os.pathsep in HOOK:
        raise ConfigError(
            f"onnx-dl run cannot start Python ({sys.executable!r}) with {HOOK!r} on its search path. Call "
            "onnx_dl.patch() in the program."
        )


def _checked(settings: Sequence[str], patch: Mapping[str, object]) -> dict[str, object]:
    """Checks the arguments for :func:`onnx_dl.patch`, so that errors appear before the program starts."""
    models = parse_models(settings)
    return checked(patch, "onnx-dl run") | {
        "models": {glob: checked(more, glob) for glob, more in models.items()}
    }
