"""Arrays that are not copied: inputs built in shared memory, results passed on, pipelines."""

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime

from onnx_dl import InferenceSessionProxy, pipeline
from onnx_dl.demo.assets import make_large_model

with tempfile.TemporaryDirectory() as folder:
    path = str(
        make_large_model(Path(folder))
    )  # 200 MiB of weights: X, 1024 numbers per row, to Y, 1024 again

    one = InferenceSessionProxy(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # other options, so another worker
    other = InferenceSessionProxy(path, options)

    x = one.empty((256, 1024))  # 1 MiB that the workers see
    x[:] = np.linspace(-1, 1, 1024)
    (y,) = one.run(None, {"X": x})  # no copy in; y is a view of what the worker wrote
    (z,) = other.run(None, {"X": y})  # passed on as it lies

    both = pipeline(one, other)  # Y feeds X; what is between them never enters this process
    (same,) = both.run(None, {"X": x})
    print("equal:", np.array_equal(z, same))
