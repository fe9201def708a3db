"""Frozen programs, which contain their own Python: made by PyInstaller, cx_Freeze or Nuitka.

Such a program is started again for each process of ours: ``sys.executable -c`` would run the program itself.
Only this module knows the environment variables of PyInstaller's processes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Final

from onnx_dl.errors import SupervisorStartError

_COMPILED: Final = globals().get("__compiled__")
"""Set by Nuitka in each module."""
_CALLED: Final = "ONNX_DL_FREEZE_SUPPORT"
"""Its value is the program that calls freeze_support().  The program's own child processes inherit it.  In
those of multiprocessing, ours is not called, because multiprocessing's freeze_support() does not return."""
_LIBRARIES: Final = "LD_LIBRARY_PATH"
_BUNDLE: Final = "_PYI_"
_HOME: Final = "_PYI_APPLICATION_HOME_DIR"
"""The folder that a one-file program was unpacked into; not set for others."""
_TOP: Final = "PYINSTALLER_RESET_ENVIRONMENT"
_BORN_WITH: Final = {name: value for name, value in os.environ.items() if name.startswith(_BUNDLE)}

_FORGOTTEN: Final = (
    "This program is frozen, and onnx-dl starts it again for its processes: write `import onnx_dl; "
    "onnx_dl.freeze_support()` as the first statement in the program, before numpy and onnxruntime are "
    "imported and arguments are parsed. Nothing was started."
)


def is_frozen() -> bool:
    """Returns whether this process runs a frozen program."""
    return bool(getattr(sys, "frozen", False) or getattr(_COMPILED, "standalone", False))


def program(*, missed: bool) -> str:
    """The file to execute for another process of this program.

    ``missed``: this process was started by us, but runs the application's code.

    Raises:
        SupervisorStartError: the program does not call freeze_support(): it would only run a second time.
    """
    path = _path()
    if missed or os.environ.get(_CALLED) != path:
        raise SupervisorStartError(_FORGOTTEN)
    return path


def advice() -> str:
    """Advice for a process that has not started as expected."""
    if not is_frozen():
        return ""
    return " In a frozen program, onnx_dl.freeze_support() must come before arguments are parsed."


def _path() -> str:
    return os.path.realpath("/proc/self/exe") if _COMPILED else sys.executable


def mark_called() -> None:
    """Records that this program calls freeze_support()."""
    os.environ[_CALLED] = _path()


def unpacks_itself() -> bool:
    """Returns whether this program was unpacked into a folder that is removed when it ends."""
    return _HOME in _BORN_WITH


def environment(environ: Mapping[str, str], *, own_folder: bool = False) -> dict[str, str]:
    """The environment for another process of this program, which shares the folder of this one.

    PyInstaller's variables are restored, because the application may have changed them: without them, the
    process would unpack itself again, and would be the child of a process that we do not know.

    ``own_folder``: it must unpack itself, because it may outlive this process.
    """
    found = dict(environ) | _BORN_WITH
    folder = getattr(sys, "_MEIPASS", None)
    if own_folder:
        found[_TOP] = "1"
    elif folder is not None and folder not in (path := found.get(_LIBRARIES, "")).split(os.pathsep):
        found[_LIBRARIES] = os.pathsep.join(filter(None, (folder, path)))
    return found


def environment_outside(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for an interpreter outside of this program: without the program's libraries."""
    hidden = (_CALLED, _LIBRARIES, f"{_LIBRARIES}_ORIG")
    found = {n: v for n, v in environ.items() if n not in hidden and not n.startswith(_BUNDLE)}
    if original := environ.get(f"{_LIBRARIES}_ORIG"):
        found[_LIBRARIES] = original
    return found
