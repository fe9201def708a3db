"""On macOS and Windows the package imports, and the parts work that models in-process need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save

from tests.support import on_other_platforms


def run_here(module: str, platform: str, folder: Path, *steps: str) -> None:
    """Runs steps of a module in a process that looks like ``platform``, with a model."""
    model = folder / "m.onnx"
    weights = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weights]
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), model)
    command = [sys.executable, "-m", module, platform, str(model), *steps]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_parts(platform: str, tmp_path: Path) -> None:
    module = on_other_platforms.__name__
    run_here(module, platform, tmp_path, "import_all", "construct", "keep_bytes", "run_engine", "refuse")
