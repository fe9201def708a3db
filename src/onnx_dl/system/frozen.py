"""Programs that bring their own Python: made by PyInstaller, cx_Freeze or Nuitka.

Such a program is started again for each process of ours; ``sys.executable -c`` would run the program itself.
What PyInstaller's processes tell each other in the environment is known here only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Final

from onnx_dl.errors import SupervisorStartError

_COMPILED: Final = globals().get("__compiled__")
"""Nuitka's word about this module."""
_CALLED: Final = "ONNX_DL_FREEZE_SUPPORT"
"""The value is the program that calls freeze_support().  Processes that it starts of itself see it, such as
those of multiprocessing, whose function of that name does not return in them, so that ours is not called."""
_LIBRARIES: Final = "LD_LIBRARY_PATH"
_BUNDLE: Final = "_PYI_"
_HOME: Final = "_PYI_APPLICATION_HOME_DIR"
"""Where a program in one file was unpacked.  It is set for no other."""
_TOP: Final = "PYINSTALLER_RESET_ENVIRONMENT"
_BORN_WITH: Final = {name: value for name, value in os.environ.items() if name.startswith(_BUNDLE)}

_FORGOTTEN: Final = (
    "This program is frozen, and onnx-dl starts processes in it: write `import onnx_dl; "
    "onnx_dl.freeze_support()` as the first thing in the program, before numpy and onnxruntime are imported "
    "and arguments are parsed. Nothing was started."
)


def is_frozen() -> bool:
    """Whether this process runs a program that brings its own Python."""
    return bool(getattr(sys, "frozen", False) or getattr(_COMPILED, "standalone", False))


def program(*, missed: bool) -> str:
    """The file to execute for another process of this program.

    ``missed``: this process was started for us, and runs as if it were the application.

    Raises:
        SupervisorStartError: the program does not call freeze_support(), so it would only run once more.
    """
    path = _path()
    if missed or os.environ.get(_CALLED) != path:
        raise SupervisorStartError(_FORGOTTEN)
    return path


def advice() -> str:
    """Why a process may have done something else than what it was started for."""
    if not is_frozen():
        return ""
    return " In a frozen program, onnx_dl.freeze_support() must come before arguments are parsed."


def _path() -> str:
    return os.path.realpath("/proc/self/exe") if _COMPILED else sys.executable


def called() -> None:
    """The program calls freeze_support()."""
    os.environ[_CALLED] = _path()


def unpacks_itself() -> bool:
    """Whether this program was unpacked into a folder that goes when it ends."""
    return _HOME in _BORN_WITH


def environment(environ: Mapping[str, str], *, own_folder: bool = False) -> dict[str, str]:
    """For another process of this program, which shares the folder that this one was unpacked into.

    The application may have changed what a bundle's processes tell each other: without it, the process would
    unpack itself, and be the child of one that we do not know.

    ``own_folder``: it is to unpack itself, because it may outlive this one.
    """
    found = dict(environ) | _BORN_WITH
    folder = getattr(sys, "_MEIPASS", None)
    if own_folder:
        found[_TOP] = "1"
    elif folder is not None:
        found[_LIBRARIES] = _with_folder(found.get(_LIBRARIES, ""), folder)
    return found


def _with_folder(path: str, folder: str) -> str:
    return path if folder in path.split(os.pathsep) else os.pathsep.join(filter(None, (folder, path)))


def environment_outside(environ: Mapping[str, str]) -> dict[str, str]:
    """For an interpreter that is not of this program: without the program's libraries."""
    hidden = (_CALLED, _LIBRARIES, f"{_LIBRARIES}_ORIG")
    found = {n: v for n, v in environ.items() if n not in hidden and not n.startswith(_BUNDLE)}
    if original := environ.get(f"{_LIBRARIES}_ORIG"):
        found[_LIBRARIES] = original
    return found
