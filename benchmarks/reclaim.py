"""What is given back: memory through cycles of load, runs of varying batch, unload.

``python -m benchmarks.reclaim [--cycles N] [--json FILE] [--png FILE]``

Three ways do the same work, each in a fresh process that reads its own memory: onnx-dl; onnxruntime with
``del`` and ``gc.collect()``; the same and ``malloc_trim(0)``.  The model has 210 MB of MatMul weights.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

BATCHES = (1, 256, 16, 1024, 4)
WAYS = {
    "onnx-dl": "onnx-dl",
    "del": "in-process: del, gc.collect()",
    "trim": "in-process: del, gc.collect(), malloc_trim(0)",
}
PROVIDERS = ["CPUExecutionProvider"]


class Meter:
    """Resident bytes of this process, and bytes private to its children, ten times a second."""

    def __init__(self) -> None:
        self.points: list[tuple[float, int, int]] = []
        self._me = psutil.Process()
        self._started = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def read(self) -> tuple[float, int, int]:
        others = 0
        for child in self._me.children(recursive=True):
            try:
                others += child.memory_full_info().uss
            except psutil.Error:
                continue
        point = time.monotonic() - self._started, self._me.memory_info().rss, others
        self.points.append(point)
        return point

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            self.read()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def work(way: str, model: str, cycles: int) -> dict:
    """In a process of its own: the cycles, and what memory was after each."""
    import numpy as np

    if way == "onnx-dl":
        from onnx_dl import InferenceSessionProxy, default_host

        proxy = InferenceSessionProxy(model, providers=PROVIDERS)
        default_host().start()
    else:
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        import onnxruntime
    data = {batch: np.ones((batch, 1024), np.float32) for batch in BATCHES}
    meter = Meter()
    before = meter.read()
    after = []
    for _ in range(cycles):
        session = proxy if way == "onnx-dl" else onnxruntime.InferenceSession(model, providers=PROVIDERS)
        for batch in BATCHES:
            session.run(None, {"X": data[batch]})
        if way == "onnx-dl":
            session.unload()
        del session
        gc.collect()
        if way == "trim":
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        after.append(meter.read())
        threading.Event().wait(0.5)  # so that the curve shows what stays
    meter.stop()
    return {
        "way": way,
        "before": before[1],
        "before_others": before[2],
        "after": [point[1] for point in after],
        "after_others": [point[2] for point in after],
        "peak": max(point[1] for point in meter.points),
        "peak_all": max(point[1] + point[2] for point in meter.points),
        "points": meter.points,
    }


def measure(model: Path, cycles: int) -> list[dict]:
    results = []
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.reclaim", "--work", way, str(model), str(cycles)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results.append(json.loads(done.stdout))
    return results


def table(results: list[dict]) -> str:
    cycles = len(results[0]["after"])
    head = "".join(f"{f'left after {i + 1}':>14}" for i in range(cycles))
    lines = [f"{'MB of the application (RSS)':<48}{'before':>8}{'peak':>8}{head}"]
    for r in results:
        left = "".join(f"{(after - r['before']) / 1e6:>+14.1f}" for after in r["after"])
        lines.append(f"{WAYS[r['way']]:<48}{r['before'] / 1e6:>8.1f}{r['peak'] / 1e6:>8.1f}{left}")
    ours = results[0]
    others = "".join(f"{(after - ours['before_others']) / 1e6:>+14.1f}" for after in ours["after_others"])
    peak = (ours["peak_all"] - ours["peak"]) / 1e6
    label = "onnx-dl: supervisor, template, workers (private)"
    lines.append(f"{label:<48}{ours['before_others'] / 1e6:>8.1f}{peak:>8.1f}{others}")
    return "\n".join(lines)


def draw(results: list[dict], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.2), dpi=110)
    styles = {"onnx-dl": ("#1b7837", "-"), "del": ("#b2182b", "-"), "trim": ("#ef8a62", "--")}
    for r in results:
        color, style = styles[r["way"]]
        times = [point[0] for point in r["points"]]
        label = "onnx-dl: application" if r["way"] == "onnx-dl" else WAYS[r["way"]]
        axes.plot(times, [p[1] / 1e6 for p in r["points"]], style, color=color, label=label, linewidth=2)
        if r["way"] == "onnx-dl":
            everything = [(p[1] + p[2]) / 1e6 for p in r["points"]]
            axes.fill_between(times, everything, color=color, alpha=0.15, label="onnx-dl: with its processes")
    axes.set_xlabel("seconds")
    axes.set_ylabel("MB")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_title(
        "A 210 MB model, loaded, run on batches of 1 to 1024, unloaded; again and again", fontsize=11
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2, frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(target)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--work", nargs=3, metavar=("WAY", "MODEL", "CYCLES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.work:
        way, model, cycles = arguments.work
        print(json.dumps(work(way, model, int(cycles))))
        return
    from onnx_dl.demo.assets import make_large_model

    with tempfile.TemporaryDirectory() as folder:
        results = measure(make_large_model(Path(folder)), arguments.cycles)
    print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results))
    if arguments.png:
        draw(results, arguments.png)


if __name__ == "__main__":
    main()
