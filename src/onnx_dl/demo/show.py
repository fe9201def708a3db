"""``onnx-dl demo``: four models with onnx-dl, then the same work in-process, then a table of both.

All figures are measured in the same run.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from onnx_dl.client.event_dispatch import EventStream
from onnx_dl.core.events import EventType, ModelEvent
from onnx_dl.core.text import sparkline
from onnx_dl.demo.assets import make_large_model, model_path
from onnx_dl.demo.memory import MemorySample, Recorder
from onnx_dl.demo.work import WorkResult, churn, predict
from onnx_dl.host.model_host import ModelHost
from onnx_dl.session.inference_session import InferenceSessionProxy
from onnx_dl.system import boot, installation

TTLS: Final = {"digits": -1.0, "wine": 2.0, "diabetes": 0.0, "large": 2.0}
_DEADLINE: Final = 30.0


class Way(NamedTuple):
    """The results of one way to do the work.  Sizes are bytes of the application's resident set."""

    before: int
    peak: int
    after: int
    outcomes: list[WorkResult]


def demo() -> None:
    """Runs the demo; prints to stdout.

    Raises:
        InstallationError: there is no onnxruntime, or it is too old.
    """
    installation.check()
    with tempfile.TemporaryDirectory(prefix="onnx-dl-demo-") as folder:
        large = _make_large(Path(folder))
        _title("With onnx-dl: each model in a process of its own")
        ours, readings, freed = _through_onnx_dl(large)
        _show_memory(readings)
        _title("The same in one process: onnxruntime, then del and gc.collect()")
        theirs = _in_process(large)
    _title("Side by side")
    print("\n".join(table(ours, theirs, freed)))
    print(
        "\nIn-process, what is left over includes onnxruntime's own code; with onnx-dl the application never"
    )
    print("imports it. The first load with onnx-dl waits until the template has imported onnxruntime, once.")


def _make_large(folder: Path) -> Path:
    def progress(done: int, total: int) -> None:
        if done == total or done * 4 // total != (done - total // 50) * 4 // total:
            print(f"  {done / 1e6:5.0f} of {total / 1e6:.0f} MB", flush=True)

    print("Making a model of 210 MB (random weights) ...", flush=True)
    return make_large_model(folder, progress)


def _through_onnx_dl(large: Path) -> tuple[Way, list[MemorySample], int]:
    started = time.time()
    events: list[ModelEvent] = []
    with ModelHost() as host, host.events() as stream, Recorder() as recorder:
        host.on_event(events.append)
        host.on_event(lambda event: print(event_line(event, started), flush=True))
        host.start()
        before = recorder.read().application
        proxies = {name: _proxy(name, large, host) for name in TTLS}
        outcomes = [_use(name, proxy) for name, proxy in proxies.items()]
        print("  ... waiting for the TTLs of wine and large to run out", flush=True)
        _await_unloads(stream, len(TTLS) - 1)
        proxies["digits"].unload()
        _await_unloads(stream, 1)
        after = recorder.read().application
        peak = max(reading.application for reading in recorder.readings)
    freed = sum(event.freed or 0 for event in events)
    return Way(before, peak, after, outcomes), recorder.readings, freed


def _proxy(name: str, large: Path, host: ModelHost) -> InferenceSessionProxy:
    path = large if name == "large" else model_path(name)
    return InferenceSessionProxy(path, providers=["CPUExecutionProvider"], ttl=TTLS[name], host=host)


def _use(name: str, proxy: InferenceSessionProxy) -> WorkResult:
    # With ttl=0 each call would load the model.  The block holds it; it unloads at the end of the block.
    started = time.perf_counter()
    with proxy.session() as session:
        load = time.perf_counter() - started
        outcome = churn(session) if name == "large" else predict(name, session)
    outcome = outcome._replace(load=load)
    print(outcome_line(outcome, f"ttl {TTLS[name]:g}"), flush=True)
    return outcome


def _await_unloads(stream: EventStream, count: int) -> None:
    while count:
        count -= stream.get(_DEADLINE).type == EventType.UNLOADED


def _in_process(large: Path) -> Way:
    launch = boot.launch("demo", str(large))
    rss: dict[str, list[int]] = {"before": [], "peak": [], "loaded": [], "deleted": []}
    outcomes = []
    with subprocess.Popen(launch.argv, env=launch.environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            report = json.loads(line)
            rss[report["when"]].append(report["rss"])
            if report["when"] == "loaded":
                outcomes.append(WorkResult(**{field: report[field] for field in WorkResult._fields}))
                print(outcome_line(outcomes[-1], "in-process"), flush=True)
            elif report["when"] == "deleted":
                print(f"           after del and gc.collect(): RSS {megabytes(report['rss'])}", flush=True)
    if process.returncode:
        raise SystemExit(f"the in-process part failed with exit code {process.returncode}")
    return Way(rss["before"][0], max(rss["peak"]), rss["deleted"][-1], outcomes)


# --- text --------------------------------------------------------------------------------------------------


def _title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def _show_memory(readings: Sequence[MemorySample]) -> None:
    top = max(reading.others for reading in readings)
    span = readings[-1].at
    print(f"\nMemory over {span:.1f} s; a full bar is {megabytes(top)}")
    print(f"  workers and supervisor |{sparkline([r.others for r in readings], 50, top)}|")
    print(f"  application            |{sparkline([r.application for r in readings], 50, top)}|")


def event_line(event: ModelEvent, started: float) -> str:
    """One line for an event; ``started``: Unix time in seconds."""
    facts = [f"pid {event.pid}"] if event.pid else []
    if event.reason:
        facts.append(f"reason {event.reason}")
    if event.type is EventType.READY:
        facts += [f"in {event.seconds:.3f} s", f"RSS {megabytes(event.rss or 0)}"]
    if event.type is EventType.UNLOADED:
        facts.append(f"gave back {megabytes(event.freed or 0)}")
    name = Path(event.model).stem
    return f"  [{event.at - started:5.2f} s] {event.type:<8} {name:<8} {', '.join(facts)}"


def outcome_line(outcome: WorkResult, how: str) -> str:
    """One line for the results of a model."""
    return f"{outcome.model:<8} ({how}): {outcome.quality}; {outcome.example}"


def megabytes(count: int) -> str:
    """``12345678`` as ``12 MB``."""
    return f"{count / 1e6:.0f} MB"


def table(ours: Way, theirs: Way, freed: int) -> list[str]:
    """The figures of both ways side by side, as lines of text."""
    same = [a.digest == b.digest for a, b in zip(ours.outcomes, theirs.outcomes, strict=True)]
    rows = [
        ("", "onnx-dl", "in-process"),
        ("application before", megabytes(ours.before), megabytes(theirs.before)),
        ("application at its peak", megabytes(ours.peak), megabytes(theirs.peak)),
        ("application after", megabytes(ours.after), megabytes(theirs.after)),
        ("left over", megabytes(ours.after - ours.before), megabytes(theirs.after - theirs.before)),
        ("given back by workers", megabytes(freed), "-"),
        ("results equal, bit for bit", f"{sum(same)} of {len(same)} models", ""),
    ]
    for a, b in zip(ours.outcomes, theirs.outcomes, strict=True):
        rows.append((f"{a.model}: load", _short(a.load), _short(b.load)))
        rows.append((f"{a.model}: call, median", _short(a.warm), _short(b.warm)))
    return [f"  {label:<34}{left:>16}{right:>16}" for label, left, right in rows]


def _short(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 0.001 else f"{seconds * 1e3:.1f} ms"
