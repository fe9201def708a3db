"""Run the models of a program that uses onnxruntime in workers.

From the command line, this needs no change of the program:

    onnx-dl run --ttl 60 program.py
"""

import numpy as np
from onnxruntime import InferenceSession

import onnx_dl
from onnx_dl.demo.assets import load_samples, model_path


class Classifier:
    """Code that does not know onnx-dl."""

    def __init__(self, model: str) -> None:
        self.session = InferenceSession(model, providers=["CPUExecutionProvider"])

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return self.session.run(None, {self.session.get_inputs()[0].name: rows})[0]


if __name__ == "__main__":
    rows = load_samples()["wine"].inputs
    in_process = Classifier(str(model_path("wine")))
    with onnx_dl.patch(ttl=60, models={"digits*": {"ttl": -1}}):
        in_worker = Classifier(str(model_path("wine")))
    print("equal results:", in_process(rows).tolist() == in_worker(rows).tolist())
    for status in onnx_dl.default_host().snapshot().models:
        print(f"{status.model.rsplit('/', 1)[-1]} is {status.state.value} in process {status.pid}")
