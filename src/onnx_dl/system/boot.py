"""Program, arguments and environment of each process that onnx-dl starts.

The processes of an ordinary program are interpreters like its own, with its search path.  Those of a frozen
program are the program itself with :data:`MARKER` as the first argument, which :func:`freeze_support` looks
for.  An *entry* is a function that such a process runs, known by its name.  Secrets are never passed as
arguments.  Imports nothing heavy: this is the first module in every process of ours.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple, NoReturn

from onnx_dl.system import descriptor_limits, frozen, heap_tuning, interpreters, process_setup

MARKER: Final = "--onnx-dl-process"

ENTRIES: Final = {
    "supervisor": "onnx_dl.supervisor.main",
    "template": "onnx_dl.workers.template",
    "saver": "onnx_dl.workers.saver",
    "trial": "onnx_dl.cli.doctor.trials",
    "demo": "onnx_dl.demo.inprocess",
    "front": "onnx_dl.server.processes.child",
}
"""Modules by the name of the entry; its function is ``main``."""

_LOAD_MODELS: Final = frozenset({"supervisor", "template"})
"""Entries of processes that become workers, or whose forks do."""

_BOOT: Final = (
    "import json, sys; path, version = json.loads(sys.argv[1]); "
    "path is None or version == [*sys.version_info[:2]] or sys.exit('onnx-dl: ' + sys.executable + "
    "' is not of the Python version of the application: set ONNX_DL_PYTHON to the path of one that is'); "
    "sys.path[:] = path or sys.path; from onnx_dl.system.boot import enter; enter(*sys.argv[2:])"
)

_entered = False
"""True in a process that :func:`launch` has started: its interpreter works."""


class Launch(NamedTuple):
    """A process to start, as arguments of ``os.execve()``."""

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
    """The program, arguments and environment for a process of ours.

    Args:
        arguments: of the entry's ``main``.
        python: the user's choice of interpreter; empty: one like this, or this program if it is frozen.
        environ: base of its environment; None: this process's.
        own_folder: the process may outlive this one, and the folder that this was unpacked into.

    Raises:
        SupervisorStartError: no interpreter was found, or the program is frozen and does not call
            :func:`freeze_support`.
    """
    given = os.environ if environ is None else environ
    if entry in _LOAD_MODELS:
        given = heap_tuning.put_in(given)
    call = [entry, json.dumps(arguments)]
    if frozen.is_frozen() and not python:
        program = frozen.program(missed=not _entered and _call() is not None)
        return Launch(program, [program, MARKER, *call], frozen.environment(given, own_folder=own_folder))
    # The search path of a frozen program is of no use to another interpreter.
    path = None if frozen.is_frozen() else process_setup.search_path()
    program = python or (sys.executable if _entered else interpreters.find())
    # -P: do not import a json.py in the current directory.
    argv = [program, "-P", "-c", _BOOT, json.dumps([path, sys.version_info[:2]]), *call]
    return Launch(program, argv, frozen.environment_outside(given) if path is None else dict(given))


def enter(entry: str = "", arguments: str = "[]", *_: str) -> None:
    """Runs an entry, for which this process was started."""
    global _entered
    _entered = True
    heap_tuning.take_out(os.environ)
    if entry not in ENTRIES:
        sys.exit(
            f"onnx-dl: this version has no process {entry!r} ({', '.join(ENTRIES)}): onnx-dl was "
            "replaced on disk while the application ran. Restart the application."
        )
    with without_collections():
        module = importlib.import_module(ENTRIES[entry])
    module.main(*json.loads(arguments))


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Imports in a process of ours: the garbage collector finds nothing, but takes 5 % of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def continue_as(entry: str, *arguments: str | int, environ: Mapping[str, str], keep: int) -> NoReturn:
    """Turns a fork of a process of ours, which has one thread, into another process of ours.

    Args:
        arguments: of the entry's ``main``.
        environ: variables that are added to its environment.
        keep: the descriptor that it inherits.  Its stdin is at its end, and all others are closed.
    """
    os.dup2(process_setup.open_null(), 0)
    os.closerange(3, keep)
    os.closerange(keep + 1, descriptor_limits.limit())
    os.chdir("/")  # the application's directory may be unmounted meanwhile
    os.environ.update(environ)
    _enter_for_good([entry, json.dumps(arguments)])


def freeze_support() -> None:
    """Lets onnx-dl start its processes from a frozen program.  Tested with PyInstaller.

    Call it at the beginning of the program, before numpy and onnxruntime are imported and arguments are
    parsed.  It does not return in a process that onnx-dl has started.  It does nothing in a program that is
    not frozen.
    """
    if not frozen.is_frozen():
        return
    frozen.mark_called()
    if (call := _call()) is not None:
        _enter_for_good(call)


def _call() -> Sequence[str] | None:
    """Entry and arguments, if this process was started by :func:`launch`.

    Also reads ``sys.orig_argv``, because the program may have changed ``sys.argv``.
    """
    for argv in (sys.argv, sys.orig_argv):
        if len(argv) == 4 and argv[1] == MARKER:
            return argv[2:]
    return None


def _enter_for_good(call: Sequence[str]) -> NoReturn:
    """Runs an entry and exits at once: no exception handlers and no exit handlers of the program run."""
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


def _status(code: object) -> int:
    """The exit status that Python has for a ``SystemExit`` code."""
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr)
    return 1
