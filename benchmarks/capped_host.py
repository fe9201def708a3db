"""Eight models of 150 MB for a cap of 500 MB: the memory that is taken, and how long a request waits.

``python -m benchmarks.capped_host [--rounds N] [--requests N] [--ways WAY ...] [--quick] [--json FILE]
[--png FILE]``

Each way (:mod:`benchmarks.capped_ways`) serves the same 300 requests in a fresh process.  Memory is PSS,
summed over that process and all its descendants; a thread of this process, which is none of them, reads it
from ``/proc/<pid>/smaps_rollup`` and pauses for 10 ms between two readings.  Workers alone count as they do
for the limit: without the pages that they share with the template since they were forked.  The pass over all
models that fills the load cache is not measured.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import psutil

from benchmarks.calls import proxy_of
from benchmarks.capped_ways import ALL, CAPPED, LRU, THREADS, Setup, work
from benchmarks.cold import caching_host, environment, wait_for_cache
from benchmarks.models import heavy
from benchmarks.report import number
from benchmarks.timing import percentile

QUICK: Final = Setup(models=4, layers=6, width=1024, cap=80_000_000, requests=14)
ROUNDS: Final = 3
_PAUSE: Final = 0.01


class Way(NamedTuple):
    """``cached``: with a load cache that has all models."""

    how: str
    name: str
    cached: bool = False


WAYS: Final = {
    "capped": Way(CAPPED, "onnx-dl, memory_limit"),
    "capped cached": Way(CAPPED, "onnx-dl, memory_limit, load cache warm", cached=True),
    "all": Way(ALL, "a worker per model for ever"),
    "all cached": Way(ALL, "a worker per model for ever, load cache warm", cached=True),
    "lru": Way(LRU, "in-process, LRU by size of files"),
}


class Held(NamedTuple):
    """Memory of a process in bytes; ``own``: the part that it did not inherit by a fork."""

    pss: int = 0
    own: int = 0


class Meter:
    """Memory of a process and all its descendants, by process id, over time."""

    def __init__(self, pid: int) -> None:
        self.points: list[tuple[float, dict[int, Held]]] = []
        """The time is when it was read, by ``time.monotonic()``, which all processes share."""
        self._root = psutil.Process(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(_PAUSE):
            with contextlib.suppress(psutil.Error):  # it has just ended
                family = [self._root, *self._root.children(recursive=True)]
                by_pid = {process.pid: _held(process.pid) for process in family}
                self.points.append((time.monotonic(), by_pid))

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def _held(pid: int) -> Held:
    """Zeros if the process has ended."""
    try:
        _, *lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (OSError, ValueError):
        return Held()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    pss, private = found["Pss"], found["Private_Clean"] + found["Private_Dirty"]
    inherited = min(found.get("Pss_Anon", 0) - found["Private_Dirty"], pss - private)
    return Held(pss, pss - max(0, inherited))


def _serve(way: str, folder: Path, setup: Setup) -> dict[str, Any]:
    """One way through the trace, with what its processes took meanwhile."""
    cache = {"ONNX_DL_CACHE": "on" if WAYS[way].cached else "off", "ONNX_DL_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-m", "benchmarks.capped_host", "--work", WAYS[way].how, str(folder)]
    child = subprocess.Popen(
        [*command, json.dumps(setup)], env=os.environ | cache, stdout=subprocess.PIPE, text=True
    )
    meter = Meter(child.pid)
    try:
        printed, _ = child.communicate()
    finally:
        child.kill()
        child.wait()
        meter.stop()
    if child.returncode:
        raise RuntimeError(f"{WAYS[way].name} ended with {child.returncode}")
    return _found(way, json.loads(printed), meter)


def _found(way: str, told: dict[str, Any], meter: Meter) -> dict[str, Any]:
    """What one way did in one round; memory in bytes, times in seconds."""
    began, ended, workers = told["began"], told["ended"], set(told["workers"])
    during = [(at, by_pid) for at, by_pid in meter.points if began <= at <= ended]
    waits = list(zip(told["seconds"], told["loaded"], strict=True))
    return {
        "way": way,
        "requests": len(waits),
        "loads": len(told["loads"]),
        "hit_rate": 1 - sum(told["loaded"]) / len(waits),
        "p50": percentile(told["seconds"], 0.5),
        "p99": percentile(told["seconds"], 0.99),
        "hit_p50": statistics.median([wait for wait, loaded in waits if not loaded] or [0.0]),
        "load_p50": statistics.median(wait for wait, loaded in waits if loaded),
        "trace": ended - began,
        "waited_for_loads": sum(wait for wait, loaded in waits if loaded),
        "loading": sum(told["loads"]),
        "peak": max(_sum(by_pid) for _, by_pid in during),
        "peak_workers": max(sum(by_pid[pid].own for pid in by_pid.keys() & workers) for _, by_pid in during),
        "pause": statistics.median(b[0] - a[0] for a, b in itertools.pairwise(during)),
        "points": [(at - began, _sum(by_pid)) for at, by_pid in during],
        "starts": told["starts"],
        "seconds": told["seconds"],
    }


def _sum(by_pid: dict[int, Held]) -> int:
    return sum(held.pss for held in by_pid.values())


# --- what is asked for -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _models(setup: Setup) -> Iterator[Path]:
    """A folder with the models, and the load cache's with what a pass over all of them left there."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i in range(setup.models):
            (folder / f"model-{i}.onnx").write_bytes(heavy(setup.layers, setup.width, seed=i))
        _fill_cache(folder, setup)
        yield folder


def _fill_cache(folder: Path, setup: Setup) -> None:
    """Loads each model once, and waits until all are saved: not part of what is measured."""
    with environment(ONNX_DL_CACHE_FROM="0"), caching_host(folder / "cache") as host:
        for path in sorted(folder.glob("*.onnx")):
            with proxy_of(str(path), host, threads=THREADS) as proxy:
                proxy.load()
        wait_for_cache(folder / "cache", setup.models)


def measure(setup: Setup, rounds: int, ways: Sequence[str] = tuple(WAYS)) -> list[dict[str, Any]]:
    """What each way did in each round; every other round goes backwards."""
    results = []
    with _models(setup) as folder:
        for turn in range(rounds):
            for way in reversed(ways) if turn % 2 else ways:
                results.append(_serve(way, folder, setup))
                print(f"round {turn + 1}, {WAYS[way].name}: {results[-1]['trace']:.0f} s", file=sys.stderr)
    return results


# --- what is told ----------------------------------------------------------------------------------------

_COLUMNS: Final[dict[str, Callable[[dict[str, Any]], float]]] = {
    "loads": lambda r: r["loads"],
    "hits, %": lambda r: 100 * r["hit_rate"],
    "p50, ms": lambda r: 1e3 * r["p50"],
    "p99, ms": lambda r: 1e3 * r["p99"],
    "with a load": lambda r: 1e3 * r["load_p50"],
    "trace, s": lambda r: r["trace"],
    "in loads, s": lambda r: r["waited_for_loads"],
    "in loads, %": lambda r: 100 * r["waited_for_loads"] / r["trace"],
    "peak, MB": lambda r: r["peak"] / 1e6,
    "of workers": lambda r: r["peak_workers"] / 1e6,
}


def table(results: Sequence[dict[str, Any]]) -> str:
    """A line for each way: the median over the rounds, and below it the least and the most."""
    lines = [f"{'':<45}" + "".join(f"{head:>13}" for head in _COLUMNS)]
    for way, (_, name, _) in WAYS.items():
        if not (mine := [r for r in results if r["way"] == way]):
            continue
        columns = [[value(r) for r in mine] for value in _COLUMNS.values()]
        lines.append(f"{name:<45}" + "".join(f"{_middle(column):>13}" for column in columns))
        if len(mine) > 1:
            lines.append(f"{'':<45}" + "".join(f"{_spread(column):>13}" for column in columns))
    return "\n".join(lines)


def _middle(values: Sequence[float]) -> str:
    return _number(statistics.median(values))


def _spread(values: Sequence[float]) -> str:
    least, most = _number(min(values)), _number(max(values))
    return "" if least == most else f"{least}-{most}"


def _number(value: float) -> str:
    """Whole ones, such as counts, without digits that say nothing; nothing at all as a dash."""
    return (f"{value:.0f}" if value == round(value) else number(value)) if value else "-"


_COLORS: Final = {
    "all": "#2166ac",
    "all cached": "#92c5de",
    "lru": "#b2182b",
    "capped": "#1b7837",
    "capped cached": "#e6a817",
}
"""What is drawn last lies on top."""


def draw(results: Sequence[dict[str, Any]], setup: Setup, target: Path) -> None:
    """The first round: memory as the trace went on, and how long requests took."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, waits) = pyplot.subplots(
        1, 2, figsize=(11, 4.8), dpi=110, width_ratios=(3, 2), layout="constrained"
    )
    for way, color in _COLORS.items():
        mine = next((r for r in results if r["way"] == way), None)
        if mine is None:
            continue
        look = {"color": color, "linewidth": 1.2, "linestyle": "--" if WAYS[way].cached else "-"}
        _draw_memory(memory, mine, look)
        shares = [100 * (i + 0.5) / mine["requests"] for i in range(mine["requests"])]
        waits.plot(shares, [1e3 * wait for wait in sorted(mine["seconds"])], **look)
    _finish(memory, waits, setup)
    figure.legend(loc="outside lower center", ncol=2, frameon=False, fontsize=9)
    figure.savefig(target)
    pyplot.close(figure)


def _draw_memory(axes: Any, mine: dict[str, Any], look: dict[str, Any]) -> None:
    """By request, not by second: the ways take very different times."""
    import numpy as np

    times, sums = zip(*mine["points"], strict=True)
    requests = np.interp(times, mine["starts"], range(mine["requests"]))
    label = f"{WAYS[mine['way']].name}: {mine['trace']:.0f} s"
    axes.plot(requests, [nbytes / 1e6 for nbytes in sums], label=label, **look)


def _finish(memory: Any, waits: Any, setup: Setup) -> None:
    memory.axhline(
        setup.cap / 1e6, color="black", linestyle="--", linewidth=1, label="the cap, which counts workers"
    )
    memory.set_xlabel("request, one after another")
    memory.set_ylabel("memory of all processes, MB (PSS)")
    memory.set_title(f"{setup.models} models, a cap of {setup.cap / 1e6:.0f} MB", fontsize=11, loc="left")
    waits.set_xlabel("% of the requests")
    waits.set_ylabel("took no longer than, ms (logarithmic)")
    waits.set_title("how long a request takes", fontsize=11, loc="left")
    waits.set_yscale("log")
    waits.set_xlim(0, 100)
    memory.set_xlim(0, setup.requests)
    memory.set_ylim(bottom=0)
    for axes in (memory, waits):
        axes.grid(alpha=0.3)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--requests", type=int, default=Setup().requests, help="the first N of the trace")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--quick", action="store_true", help="small models, few requests: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE")
    parser.add_argument("--work", nargs=3, metavar=("WAY", "FOLDER", "SETUP"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.work:
        how, folder, setup = arguments.work
        print(json.dumps(work(how, folder, Setup(*json.loads(setup)))))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # and end the child
    setup = QUICK if arguments.quick else Setup(requests=arguments.requests)
    results = measure(setup, arguments.rounds, arguments.ways)
    print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results))
    if arguments.png:
        draw(results, setup, arguments.png)


if __name__ == "__main__":
    main()
