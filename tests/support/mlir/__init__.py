"""Models of onnx-mlir's kind, in C, and what compiles them.

They carry ``runtime.h``, the tests' own implementation of onnx-mlir's C ABI, so that onnx-mlir itself need
not be installed.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Compile = Callable[..., Path]


def compiler(folder: Path) -> Compile:
    """Returns ``compile(name, *flags, to=name)``: the path of the library made from ``name.c``, made once."""
    if (cc := shutil.which("cc")) is None:
        pytest.skip("there is no C compiler (cc) to make models with")

    def compile(name: str, *flags: str, to: str | None = None) -> Path:
        path = folder / f"{to or name}.so"
        if not path.exists():
            source = Path(__file__).with_name(f"{name}.c")
            subprocess.run(
                [cc, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", *flags, "-o", path, source], check=True
            )
        return path

    return compile
