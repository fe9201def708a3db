"""Load a model on first use, run it, unload it. No `if __name__ == "__main__"` is needed."""

from onnx_dl import InferenceSessionProxy
from onnx_dl.demo.assets import load_samples, model_path

digits = InferenceSessionProxy(model_path("digits"), ttl="30s")
print("constructed, loaded:", digits.is_loaded)

samples = load_samples()["digits"]
labels, probabilities = digits.run(None, {"pixels": samples.inputs[:5]})
print("predicted", labels.tolist(), "true", samples.targets[:5].tolist())
print("first row's best probability:", round(float(probabilities[0].max()), 3))
print("after the first use, loaded:", digits.is_loaded)

print("inputs:", *digits.get_inputs())
print("unloaded:", digits.unload(), "- loaded:", digits.is_loaded)
