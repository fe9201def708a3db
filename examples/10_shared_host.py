"""Two programs that share one copy of a model, through a host that both find by its name."""

import subprocess
import sys

import onnx_dl
from onnx_dl.demo.assets import load_samples, model_path

NAME = "example-10"

if "--other" in sys.argv:
    # The second program. It finds the host, and the model is loaded there already.
    host = onnx_dl.connect(NAME, start=False)
    digits = host.open(model_path("digits"), ttl=60)
    digits.run(None, {"pixels": load_samples()["digits"].inputs})
    (model,) = host.snapshot().models
    print(f"the other program: process {model.pid}, {model.leases} programs, loaded {model.loads} time(s)")
else:
    host = onnx_dl.connect(NAME)  # starts the host in the background
    try:
        digits = host.open(model_path("digits"), ttl=60)
        digits.run(None, {"pixels": load_samples()["digits"].inputs})
        (model,) = host.snapshot().models
        print(f"this program: process {model.pid}", flush=True)
        subprocess.run([sys.executable, __file__, "--other"], check=True, timeout=60)
    finally:
        host.stop()  # without this, the host ends after a minute without clients and models
