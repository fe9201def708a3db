"""What a call costs: ``run()`` in-process and through the proxy, interleaved in one run.

``python -m benchmarks.overhead [--rounds N] [--json FILE]``
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime

from benchmarks.models import Case, cases
from onnx_dl import InferenceSessionProxy, ModelHost

PROVIDERS = ["CPUExecutionProvider"]


def options() -> onnxruntime.SessionOptions:
    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads = 2
    return made


def timed(call: Callable[[], object], count: int) -> list[float]:
    """Seconds of each of ``count`` calls."""
    times = []
    for _ in range(count):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times


def percentile(times: list[float], share: float) -> float:
    return sorted(times)[min(len(times) - 1, int(share * len(times)))]


def measure(case: Case, host: ModelHost, rounds: int) -> dict[str, float | str | bool]:
    """One case; times in µs, medians over rounds of each round's percentile."""
    local = onnxruntime.InferenceSession(case.model, options(), providers=PROVIDERS)
    proxy = InferenceSessionProxy(case.model, options(), providers=PROVIDERS, host=host)
    (data,) = case.feed.values()
    target = np.empty_like(data)
    ways = {
        "in_process": lambda: local.run(None, case.feed),
        "proxy": lambda: proxy.run(None, case.feed),
        "copy": lambda: np.copyto(target, data),
    }
    equal = all(map(np.array_equal, ways["in_process"](), ways["proxy"]()))
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, call in ways.items():
            times = timed(call, case.calls)
            if turn:  # the first round warms up
                found[name].append((percentile(times, 0.5), percentile(times, 0.99)))
    proxy.close()
    result: dict[str, float | str | bool] = {"case": case.name, "equal": equal}
    for name, pairs in found.items():
        result[f"{name}_p50"] = statistics.median(p50 for p50, _ in pairs) * 1e6
        result[f"{name}_p99"] = statistics.median(p99 for _, p99 in pairs) * 1e6
    added = [(p[0] - q[0]) * 1e6 for p, q in zip(found["proxy"], found["in_process"], strict=True)]
    result["added_p50"] = statistics.median(added)
    result["added_least"], result["added_most"] = min(added), max(added)
    return result


def cold(host: ModelHost, rounds: int) -> dict[str, float]:
    """Seconds (and cycles per second) of what happens before a model is warm."""
    case = cases()[0]
    code = (
        "import numpy as np, time; started = time.perf_counter()\n"
        "from onnx_dl import InferenceSessionProxy\n"
        f"proxy = InferenceSessionProxy({case.model!r}, providers={PROVIDERS!r})\n"
        "proxy.run(None, {'x': np.zeros((1, 16), 'f')}); print(time.perf_counter() - started)"
    )
    fresh = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(5)
    ]
    proxy = InferenceSessionProxy(case.model, providers=PROVIDERS, host=host)
    reloads = []
    for _ in range(rounds):
        proxy.unload()
        reloads += timed(lambda: proxy.run(None, case.feed), 1)
    proxy.close()
    brief = InferenceSessionProxy(case.model, providers=PROVIDERS, ttl=0, host=host)
    brief.run(None, case.feed)
    loads = host.snapshot().seq
    started = time.perf_counter()
    for _ in range(4 * rounds):
        brief.run(None, case.feed)
    cycles = (host.snapshot().seq - loads) / 4 / (time.perf_counter() - started)  # four events a cycle
    return {
        "fresh_application_first_call": statistics.median(fresh),
        "unloaded_to_first_result": statistics.median(reloads),
        "ttl_0_cycles_per_second": cycles,
    }


def table(results: list[dict], cold_figures: dict[str, float]) -> str:
    head = (
        f"{'µs':<22}{'in-process':>22}{'proxy':>22}{'added':>10}{'(least, most)':>18}{'ratio':>7}{'copy':>8}"
    )
    lines = [head, f"{'':<22}{'p50':>11}{'p99':>11}{'p50':>11}{'p99':>11}{'p50':>10}"]
    for r in results:
        spread = f"({r['added_least']:.0f}, {r['added_most']:.0f})"
        lines.append(
            f"{r['case']:<22}{r['in_process_p50']:>11.1f}{r['in_process_p99']:>11.1f}{r['proxy_p50']:>11.1f}"
            f"{r['proxy_p99']:>11.1f}{r['added_p50']:>10.1f}{spread:>18}"
            f"{r['proxy_p50'] / r['in_process_p50']:>7.2f}{r['copy_p50']:>8.1f}"
            + ("" if r["equal"] else "  OUTPUTS DIFFER")
        )
    lines.append("")
    lines += [f"{name.replace('_', ' '):<40}{value:>10.3f}" for name, value in cold_figures.items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    with ModelHost() as host:
        results = [measure(case, host, arguments.rounds) for case in cases()]
        cold_figures = cold(host, arguments.rounds)
    print(table(results, cold_figures))
    if arguments.json:
        arguments.json.write_text(json.dumps({"calls": results, "cold": cold_figures}, indent=1))


if __name__ == "__main__":
    main()
