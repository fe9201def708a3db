"""A machine without a GPU that says it has one, so that what is written for a GPU is executed.

The folder's ``sitecustomize`` has each session say that it uses CUDA, with memory of the stand-in for CUDA's
driver; its modules ``torch`` and ``pynvml`` stand in for those.  Sessions compute on the CPU, so this tells
whether tests and benchmarks run, and nothing about a GPU.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.support import fake_cuda

_HERE = Path(__file__).parent


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """Returns the environment of a process that believes it.  ``folder``: for the stand-in."""
    fake_cuda.build(folder)
    root = str(_HERE.parents[2])
    paths = [str(_HERE), root, str(Path(root, "src")), *filter(None, [os.environ.get("PYTHONPATH")])]
    return fake_cuda.environment(folder, **variables) | {"PYTHONPATH": os.pathsep.join(paths)}
