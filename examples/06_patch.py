"""A program that knows onnxruntime only, with its models in workers.

The same from the command line, without a word in the program:

    onnx-dl run --ttl 60 program.py
"""

import numpy as np
from onnxruntime import InferenceSession

import onnx_dl
from onnx_dl.demo.assets import load_samples, model_path


class Classifier:
    """What somebody else wrote, who never heard of onnx-dl."""

    def __init__(self, model: str) -> None:
        self.session = InferenceSession(model, providers=["CPUExecutionProvider"])

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return self.session.run(None, {self.session.get_inputs()[0].name: rows})[0]


if __name__ == "__main__":
    rows = load_samples()["wine"].inputs
    at_home = Classifier(str(model_path("wine")))
    with onnx_dl.patch(ttl=60, models={"digits*": {"ttl": -1}}):
        apart = Classifier(str(model_path("wine")))
    print("equal results:", at_home(rows).tolist() == apart(rows).tolist())
    for status in onnx_dl.default_host().snapshot().models:
        print(f"{status.model.rsplit('/', 1)[-1]} is {status.state.value} in process {status.pid}")
