"""Many threads and proxies, one worker: the model is in memory once."""

import logging
from concurrent.futures import ThreadPoolExecutor

from onnx_dl import InferenceSessionProxy, default_host
from onnx_dl.demo.assets import load_samples, model_path

logging.basicConfig(format="%(message)s")
logging.getLogger("onnx_dl").setLevel(logging.INFO)  # shows loads and unloads on stderr

samples = load_samples()["wine"]
proxies = [InferenceSessionProxy(model_path("wine"), ttl=60) for _ in range(4)]


def classify(i):
    return proxies[i % 4].run(None, {samples.input_name: samples.inputs[i : i + 1]})[0][0]


with ThreadPoolExecutor(8) as pool:
    classes = list(pool.map(classify, range(len(samples.inputs))))

right = sum(a == b for a, b in zip(classes, samples.targets, strict=True))
print(f"{right} of {len(classes)} right, by 4 proxies in 8 threads")
for model in default_host().snapshot().models:
    print(f"one worker: pid {model.pid}, {model.leases} proxies, loaded {model.loads} time(s)")
