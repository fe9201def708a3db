"""What children of multiprocessing find by name; :mod:`application` is not imported in them."""

import numpy as np

import onnx_dl

X = {"x": np.full(4, 2, np.float32)}


def use(model: str, **how: object) -> float:
    proxy = onnx_dl.InferenceSessionProxy(model, providers=["CPUExecutionProvider"], **how)
    return float(proxy.run(None, X)[0][0])


def send(model: str, end: object) -> None:
    end.send(use(model))
