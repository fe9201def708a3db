"""Which Python our processes run in, where the program is an ordinary one.

``sys.executable`` is empty, None or another program where an application embeds Python.  Such a program must
not be started to find out what it is, so candidates are judged by their names.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from onnx_dl.errors import SupervisorStartError

_NAME: Final = re.compile(r"(?:python|pypy)(\d+(?:\.\d+)?)?(?![\d.])\S*")
"""Names of interpreters, with the version that they claim: python, python3.12, python3.13t, python3-dbg."""


class Facts(NamedTuple):
    """What this interpreter says of itself."""

    executable: str | None
    base_executable: str | None
    prefix: str
    base_prefix: str
    exec_prefix: str
    version: tuple[int, int]


def present() -> Facts:
    """Those of this process."""
    return Facts(
        sys.executable,
        getattr(sys, "_base_executable", None),
        sys.prefix,
        sys.base_prefix,
        sys.exec_prefix,
        sys.version_info[:2],
    )


def find() -> str:
    """An interpreter like the one that runs this, in the same virtual environment.

    Raises:
        SupervisorStartError: there is none where it should be; the message says what to set.
    """
    facts = present()
    for path in candidates(facts):
        if is_python(path, facts.version, os.path.realpath) and _can_be_run(path):
            return path
    raise SupervisorStartError(
        f"Found no interpreter of Python {_dotted(facts.version)} to start processes with "
        f"(sys.executable is {facts.executable!r}): set ONNX_DL_PYTHON to the path of one that can import "
        "what this program imports."
    )


def candidates(facts: Facts) -> Iterator[str]:
    """Paths at which it may be, the likeliest first; those in a virtual environment before what it was made
    from."""
    in_environment = facts.prefix != facts.base_prefix
    folders: Sequence[str] = [facts.prefix] if in_environment else []
    yield from filter(None, [facts.executable])
    yield from _in_folders(folders, facts.version)
    yield from filter(None, [facts.base_executable])
    yield from _in_folders([facts.exec_prefix, facts.base_prefix], facts.version)


def _in_folders(prefixes: Sequence[str], version: tuple[int, int]) -> Iterator[str]:
    for prefix in filter(None, prefixes):
        for name in (f"python{_dotted(version)}", f"python{version[0]}", "python"):
            yield os.path.join(prefix, "bin", name)


def is_python(path: str, version: tuple[int, int], resolve: Callable[[str], str]) -> bool:
    """Whether this is an interpreter of this version, by its name or the name of what it leads to.

    ``resolve``: follows symbolic links.  ``python3`` may lead to ``python3.13``; then both count.
    """
    claims = {_claimed(path), _claimed(resolve(path))} - {None}
    fitting = {"", str(version[0]), _dotted(version)}
    return os.path.isabs(path) and bool(claims) and claims <= fitting


def _claimed(path: str) -> str | None:
    """The version in a name, which may be empty; None: that is no name of an interpreter."""
    match = _NAME.fullmatch(os.path.basename(path))
    return None if match is None else match[1] or ""


def _can_be_run(path: str) -> bool:
    # By what this process may do, not by its real user: a service may have been given capabilities.
    return os.path.isfile(path) and os.access(path, os.X_OK, effective_ids=True)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
