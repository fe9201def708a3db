"""More models than memory: idle models are unloaded when another one needs the memory."""

from onnx_dl import EventType, ModelHost
from onnx_dl.demo.assets import load_samples, model_path

NAMES = ("digits", "wine", "diabetes")
unloaded = []

with ModelHost(memory_limit="40MB") as host:  # two of the three fit
    host.on_event(lambda event: unloaded.append(event) if event.type is EventType.UNLOADED else None)
    proxies = {name: host.open(model_path(name)) for name in NAMES}
    for name in NAMES * 2:
        samples = load_samples()[name]
        proxies[name].run(None, {samples.input_name: samples.inputs})
        now = host.snapshot()
        loaded = [status.model.rsplit("/", 1)[-1] for status in now.models if status.pid]
        print(
            f"{name}: {now.memory_in_use / 1e6:.0f} of {now.memory_limit / 1e6:.0f} MB, {', '.join(loaded)}"
        )

evicted = [event.model.rsplit("/", 1)[-1] for event in unloaded if event.reason == "evicted"]
print(f"every call was answered; {len(evicted)} evictions, the first of {evicted[0]}")
