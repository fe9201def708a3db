"""``onnx-dl serve --demo``: the demo's models, and three commands that try them."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys

import msgspec

from onnx_dl.demo import assets
from onnx_dl.server.options import ServeOptions


def with_models(options: ServeOptions) -> ServeOptions:
    """Adds to the options the demo's models by their names; models that the user has given stay."""
    models = {name: str(assets.model_path(name)) for name in assets.SMALL_MODELS}
    return msgspec.structs.replace(options, models=models | options.models)


def commands(http: str, host: str) -> str:
    """Commands for a shell: is it ready, one inference, and the models in memory.  Each can be pasted.

    ``http``: "host:port", empty if HTTP cannot be used without more; ``host``: name of the shared host.
    """
    lines = [f"{_command()} ps --host {host}"]
    if http:
        ready = f"curl -i http://{http}/v2/health/ready"
        infer = f"curl http://{http}/v2/models/diabetes/infer -d '{_request()}'"
        lines = [ready, infer, *lines]
    return "\n".join(["Try in another terminal:", *(f"  {line}" for line in lines)])


def _request() -> str:
    """A request in JSON, with one row that the model was not trained on."""
    samples = assets.load_samples()["diabetes"]
    row = samples.inputs[:1]
    given = {
        "name": samples.input_name,
        "shape": list(row.shape),
        "datatype": "FP32",
        "data": [round(float(value), 6) for value in row.ravel()],
    }
    return json.dumps({"inputs": [given]})


def _command() -> str:
    """The command ``onnx-dl`` of this installation."""
    found = shutil.which("onnx-dl")
    if found is not None and os.path.dirname(found) == os.path.dirname(sys.executable):
        return "onnx-dl"
    return f"{shlex.quote(sys.executable)} -m onnx_dl"
