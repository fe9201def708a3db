"""Arrays that are not copied: inputs built in shared memory, results passed on, pipelines."""

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime

from onnx_dl import InferenceSessionProxy, pipeline
from onnx_dl.demo.assets import make_large_model

with tempfile.TemporaryDirectory() as folder:
    # 200 MiB of weights. The model takes X, 1024 numbers per row, and gives Y of the same shape.
    path = str(make_large_model(Path(folder)))

    one = InferenceSessionProxy(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # other options, so another worker
    other = InferenceSessionProxy(path, options)

    x = one.empty((256, 1024))  # 1 MiB in shared memory, which the workers map
    x[:] = np.linspace(-1, 1, 1024)
    (y,) = one.run(None, {"X": x})  # x is not copied; y is a view of the worker's memory
    (z,) = other.run(None, {"X": y})  # y is passed by reference

    both = pipeline(one, other)  # Y of the first feeds X of the second, without this process between them
    (same,) = both.run(None, {"X": x})
    print("equal:", np.array_equal(z, same))
