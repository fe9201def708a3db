"""Keep a model loaded for a block of calls, and close it."""

from onnx_dl import InferenceSessionProxy
from onnx_dl.demo.assets import load_samples, model_path

samples = load_samples()["diabetes"]

# The proxy as a context manager: closed at the end, and so unloaded.
with InferenceSessionProxy(model_path("diabetes"), ttl=0) as scores:
    # With ttl=0 every call would load and unload; session() holds the model for the block.
    with scores.session() as session:
        rows = [session.run(None, {samples.input_name: row[None]})[0].item() for row in samples.inputs[:5]]
        print("in the block, loaded:", session.is_loaded)
    print("predicted", [round(row) for row in rows], "true", [round(t) for t in samples.targets[:5].tolist()])
print("closed")
