"""The same function with onnxruntime's class and with ours: equal results, bit for bit."""

import numpy as np
import onnxruntime

import onnx_dl
from onnx_dl.demo.assets import load_samples, model_path


def classify(session_class):
    session = session_class(str(model_path("digits")), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return session.run(None, {name: load_samples()["digits"].inputs})


theirs = classify(onnxruntime.InferenceSession)
ours = classify(onnx_dl.InferenceSession)
print("equal:", all(np.array_equal(a, b) for a, b in zip(theirs, ours, strict=True)))

proxy = onnx_dl.InferenceSession(model_path("digits"))
print("isinstance:", isinstance(proxy, onnxruntime.InferenceSession))
try:
    proxy.run(None, {"pixels": np.zeros((1, 3), np.float32)})
except onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument as error:
    print("the same error:", str(error).splitlines()[0])
