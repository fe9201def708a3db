"""Looks through distributions: ``python contents.py dist/*``."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path

WANTED = {
    ".whl": [
        "onnx_dl/py.typed",
        "onnx_dl/__init__.py",
        "onnx_dl/demo/assets/*.onnx",
        "onnx_dl/server/grpc/open_inference.desc",
        "onnx_dl/server/grpc/LICENSES.txt",
        "*.dist-info/licenses/LICENSE",
    ],
    ".gz": [
        "*/LICENSE",
        "*/README.md",
        "*/CHANGELOG.md",
        "*/tests/conftest.py",
        "*/docs/architecture.md",
        "*/docs/conf.py",
        "*/src/onnx_dl/py.typed",
    ],
}
"""Patterns that must be there, by suffix."""
UNWANTED = {
    ".whl": ["tests/*", "benchmarks/*", "*.pyc", "examples/*"],
    ".gz": ["*.pyc", "*/.git/*", "*/large.bin", "*/_build/*"],
}


def names(path: Path) -> list[str]:
    if path.suffix == ".whl":
        return zipfile.ZipFile(path).namelist()
    with tarfile.open(path) as archive:
        return archive.getnames()


def faults(path: Path) -> list[str]:
    found = names(path)
    missing = [want for want in WANTED[path.suffix] if not any(fnmatch(name, want) for name in found)]
    extra = [name for name in found if any(fnmatch(name, no) for no in UNWANTED[path.suffix])]
    return [f"{path.name} lacks {want}" for want in missing] + [f"{path.name} has {name}" for name in extra]


if __name__ == "__main__":
    sys.exit("\n".join(fault for path in map(Path, sys.argv[1:]) for fault in faults(path)) or 0)
