"""Adds modules that are imported by name, and the package versions that caches depend on.

The commands and the library for their tables are left out: a program that uses them imports them.
"""

import importlib.metadata
import sys

from PyInstaller.utils.hooks import collect_submodules, copy_metadata

_COMMANDS = ("__main__", "cli", "demo")


def _is_used(name: str) -> bool:
    return name.split(".")[1:2] not in ([command] for command in _COMMANDS) and "__pyinstaller" not in name


hiddenimports = collect_submodules("onnx_dl", filter=_is_used)
datas = []
for _name in ("onnx-dl", *importlib.metadata.packages_distributions().get("onnxruntime", ())):
    try:
        datas += copy_metadata(_name)
    except importlib.metadata.PackageNotFoundError:
        print(f"onnx-dl: {_name} has no metadata; the program will not know its version", file=sys.stderr)
