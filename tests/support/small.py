"""As many small models as a test needs, all different."""

from __future__ import annotations

import numpy as np
from onnx import numpy_helper

from tests.contract.both import F, model, node, tensor


def plus(constant: float) -> bytes:
    """y = x + constant, of any length."""
    ends = [tensor(name, F, ["N"]) for name in "xy"]
    constants = [numpy_helper.from_array(np.array([constant], np.float32), "c")]
    return model([node("Add", ["x", "c"], ["y"])], ends[:1], ends[1:], constants)
