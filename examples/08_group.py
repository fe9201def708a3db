"""Models that are used together, in one worker: one process, one CUDA context, one unload."""

from onnx_dl import InferenceSessionProxy, default_host
from onnx_dl.demo.assets import load_samples, model_path

# Make the proxies first: the first call loads each model of the group that has a proxy.
proxies = {
    name: InferenceSessionProxy(model_path(name), group="demo", ttl=60)
    for name in ("digits", "wine", "diabetes")
}
for name, proxy in proxies.items():
    samples = load_samples()[name]
    proxy.run(None, {samples.input_name: samples.inputs})

(worker,) = default_host().snapshot().models
print(f"{worker.model}: {len(worker.members)} models in process {worker.pid}, loaded {worker.loads} time(s)")
proxies["wine"].unload()
print("loaded after the unload of one:", [proxy.is_loaded for proxy in proxies.values()])
