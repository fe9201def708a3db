"""Finds the Python interpreter for our processes, if the application is not frozen.

``sys.executable`` is empty, None or another program if an application embeds Python.  A program must not be
started to find out what it is, so candidates are judged by their names.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from onnx_dl.errors import SupervisorStartError

_NAME: Final = re.compile(r"(?:python|pypy)(\d+(?:\.\d+)?)?(?![\d.])\S*")
"""Names of interpreters, with their version: python, python3.12, python3.13t, python3-dbg."""


class Facts(NamedTuple):
    """Paths and version of an interpreter, from ``sys``."""

    executable: str | None
    base_executable: str | None
    prefix: str
    base_prefix: str
    exec_prefix: str
    version: tuple[int, int]


def current() -> Facts:
    """The facts of this process."""
    return Facts(
        sys.executable,
        getattr(sys, "_base_executable", None),
        sys.prefix,
        sys.base_prefix,
        sys.exec_prefix,
        sys.version_info[:2],
    )


def find() -> str:
    """The path of an interpreter like this one, in the same virtual environment.

    Raises:
        SupervisorStartError: none was found; the message says which variable to set.
    """
    facts = current()
    for path in candidates(facts):
        if not (is_python(path, facts.version, os.path.realpath) and os.path.isfile(path)):
            continue
        if os.access(path, os.X_OK, effective_ids=True):  # a service may have capabilities
            return path
    raise SupervisorStartError(
        f"Found no interpreter of Python {_dotted(facts.version)} to start processes with "
        f"(sys.executable is {facts.executable!r}): set ONNX_DL_PYTHON to the path of one that can import "
        "the packages of this program."
    )


def candidates(facts: Facts) -> Iterator[str]:
    """Possible paths of the interpreter, the likeliest first: the virtual environment before its base."""
    in_environment = facts.prefix != facts.base_prefix
    yield from filter(None, [facts.executable])
    yield from _in_folders([facts.prefix] if in_environment else [], facts.version)
    yield from filter(None, [facts.base_executable])
    yield from _in_folders([facts.exec_prefix, facts.base_prefix], facts.version)


def _in_folders(prefixes: Sequence[str], version: tuple[int, int]) -> Iterator[str]:
    for prefix in filter(None, prefixes):
        for name in (f"python{_dotted(version)}", f"python{version[0]}", "python"):
            yield os.path.join(prefix, "bin", name)


def is_python(path: str, version: tuple[int, int], resolve: Callable[[str], str]) -> bool:
    """Returns whether this is an interpreter of this version, by its name and the name of its link's target.

    ``resolve``: follows symbolic links.  ``python3`` may be a link to ``python3.13``; both must fit then.
    """
    claims = {_claimed(path), _claimed(resolve(path))} - {None}
    fitting = {"", str(version[0]), _dotted(version)}
    return os.path.isabs(path) and bool(claims) and claims <= fitting


def _claimed(path: str) -> str | None:
    """The version in an interpreter's name, may be empty; None: not an interpreter's name."""
    match = _NAME.fullmatch(os.path.basename(path))
    return None if match is None else match[1] or ""


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
