"""The demo's work with onnxruntime in one process: ``python -m onnx_dl.demo.inprocess LARGE_MODEL``.

Prints one JSON object per line as it goes: outcomes and memory.  After each model ``del`` and
``gc.collect()`` do what they can.
"""

from __future__ import annotations

import gc
import json
import sys
import time

import psutil

from onnx_dl.demo.assets import model_path
from onnx_dl.demo.work import SMALL, Outcome, churn, predict


def main(large: str) -> None:
    """Does the work and reports it."""
    _report("before")
    for name in (*SMALL, "large"):
        outcome = _one(name, large)
        _report("loaded", outcome)
        gc.collect()
        _report("deleted")


def _one(name: str, large: str) -> Outcome:
    import onnxruntime

    path = large if name == "large" else str(model_path(name))
    started = time.perf_counter()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    load = time.perf_counter() - started
    outcome = churn(session) if name == "large" else predict(name, session)
    _report("peak")
    del session
    return outcome._replace(load=load)


def _report(when: str, outcome: Outcome | None = None) -> None:
    line = {"when": when, "rss": psutil.Process().memory_info().rss}
    print(json.dumps(line | (outcome._asdict() if outcome else {})), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
