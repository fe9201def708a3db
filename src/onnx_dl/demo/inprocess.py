"""The demo's work with onnxruntime in one process, which :mod:`onnx_dl.demo.show` starts.

Prints outcomes and memory, one JSON object per line.  After each model it calls ``del`` and ``gc.collect()``.
In the end, when memory is measured, it compares the times of calls (:mod:`onnx_dl.demo.compare`).
"""

from __future__ import annotations

import gc
import json
import time

import psutil

from onnx_dl.demo.assets import SMALL_MODELS, model_path
from onnx_dl.demo.work import WorkResult, churn, predict


def main(large: str) -> None:
    """Does the work and prints its results."""
    _report("before")
    for name in (*SMALL_MODELS, "large"):
        outcome = _one(name, large)
        _report("loaded", outcome)
        gc.collect()
        _report("deleted")
    from onnx_dl.demo.compare import compare

    print(json.dumps({"when": "compared", "calls": compare(large)}), flush=True)


def _one(name: str, large: str) -> WorkResult:
    path = large if name == "large" else str(model_path(name))
    started = time.perf_counter()
    import onnxruntime  # takes time for the first model, as it does in the first worker

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    load = time.perf_counter() - started
    outcome = churn(session) if name == "large" else predict(name, session)
    _report("peak")
    del session
    return outcome._replace(load=load)


def _report(when: str, outcome: WorkResult | None = None) -> None:
    line = {"when": when, "rss": psutil.Process().memory_info().rss}
    print(json.dumps(line | (outcome._asdict() if outcome else {})), flush=True)
