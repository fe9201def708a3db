"""How a process of ours is started: which program, with which arguments, in which environment.

An ordinary program's processes are interpreters like its own, with its search path.  A frozen program's are
the program itself with :data:`MARKER` as its first argument, which :func:`freeze_support` looks for.  What
such a process does is an *entry*, known by its name.  Secrets do not travel in arguments.  Imports nothing
heavy: this is the first thing in every process of ours.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, NoReturn

from onnx_dl.system import frozen, interpreters, process_setup

MARKER: Final = "--onnx-dl-process"

ENTRIES: Final = {
    "supervisor": "onnx_dl.supervisor.main",
    "template": "onnx_dl.workers.template",
    "saver": "onnx_dl.workers.saver",
    "trial": "onnx_dl.cli.doctor.trials",
    "demo": "onnx_dl.demo.inprocess",
}
"""Modules by the name of the entry; the function is ``main``."""

_BOOT: Final = (
    "import json, sys; path, version = json.loads(sys.argv[1]); "
    "path is None or version == [*sys.version_info[:2]] or sys.exit('onnx-dl: ' + sys.executable + "
    "' is not of the Python version of the application: set ONNX_DL_PYTHON to the path of one that is'); "
    "sys.path[:] = path or sys.path; from onnx_dl.system.boot import enter; enter(*sys.argv[2:])"
)

_entered = False
"""Whether this is a process of ours: its interpreter has proven to be one."""


class Launch(NamedTuple):
    """What to execute."""

    program: str
    argv: list[str]
    environment: dict[str, str]


def launch(
    entry: str,
    *arguments: str | int,
    python: str = "",
    environ: Mapping[str, str] | None = None,
    own_folder: bool = False,
) -> Launch:
    """How to start a process of ours.

    Args:
        arguments: of the entry's ``main``.
        python: the interpreter that the user chose; empty: one like this, or this program if it is frozen.
        environ: what its environment is made from; None: this process's.
        own_folder: it may outlive this process, and the folder that this was unpacked into.

    Raises:
        SupervisorStartError: there is no interpreter, or the program is frozen and does not call
            :func:`freeze_support`.
    """
    given = os.environ if environ is None else environ
    call = [entry, json.dumps(arguments)]
    if frozen.is_frozen() and not python:
        program = frozen.program(missed=not _entered and _call() is not None)
        return Launch(program, [program, MARKER, *call], frozen.environment(given, own_folder=own_folder))
    # The search path of a frozen program leads into the program; another interpreter has its own.
    path = None if frozen.is_frozen() else process_setup.search_path()
    program = python or (sys.executable if _entered else interpreters.find())
    # -P: a file named json.py in the current directory is not ours to import.
    argv = [program, "-P", "-c", _BOOT, json.dumps([path, sys.version_info[:2]]), *call]
    return Launch(program, argv, frozen.environment_outside(given) if path is None else dict(given))


def enter(entry: str = "", arguments: str = "[]", *_: str) -> None:
    """Runs an entry in this process, which was started for it."""
    global _entered
    _entered = True
    if entry not in ENTRIES:
        sys.exit(
            f"onnx-dl: there is no process {entry!r} in this version ({', '.join(ENTRIES)}): onnx-dl was "
            "replaced on disk while the application ran. Restart the application."
        )
    importlib.import_module(ENTRIES[entry]).main(*json.loads(arguments))


def freeze_support() -> None:
    """Lets onnx-dl start its processes in a frozen program.  Tried with PyInstaller.

    Call it first thing in the program, before numpy and onnxruntime are imported and arguments are parsed.
    In a process that onnx-dl has started this does not return.  In a program that is not frozen it does
    nothing.
    """
    if not frozen.is_frozen():
        return
    frozen.called()
    if (call := _call()) is not None:
        _enter_for_good(call)


def _call() -> Sequence[str] | None:
    """The entry and its arguments, if this process was started by :func:`launch`; the program may have
    changed ``sys.argv``."""
    for argv in (sys.argv, sys.orig_argv):
        if len(argv) == 4 and argv[1] == MARKER:
            return argv[2:]
    return None


def _enter_for_good(call: Sequence[str]) -> NoReturn:
    """Nothing of the program runs after that, neither its exception handlers nor what it does at its end."""
    status = 1
    try:
        enter(*call)
        status = 0
    except SystemExit as end:
        status = _status(end.code)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(status)


def _status(code: Any) -> int:
    """As Python ends with it."""
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr)
    return 1
