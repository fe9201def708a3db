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
from typing import TYPE_CHECKING, Final, NamedTuple

from onnx_dl.client.event_dispatch import EventStream
from onnx_dl.core.events import EventType, ModelEvent
from onnx_dl.core.text import duration, sparkline
from onnx_dl.demo.assets import LARGE_DATA_BYTES, make_large_model, model_path
from onnx_dl.demo.compare import CallTimes
from onnx_dl.demo.memory import MemorySample, Recorder
from onnx_dl.demo.work import WorkResult, churn, predict
from onnx_dl.host.model_host import ModelHost
from onnx_dl.session.inference_session import InferenceSessionProxy
from onnx_dl.system import boot, installation

if TYPE_CHECKING:
    from rich.console import Console

TTLS: Final = {"digits": -1.0, "wine": 2.0, "diabetes": 0.0, "large": 2.0}
_DEADLINE: Final = 30.0
_STYLES: Final = {
    EventType.LOADING: "yellow",
    EventType.READY: "green",
    EventType.DRAINING: "dim",
    EventType.UNLOADED: "cyan",
    EventType.FAILED: "bold red",
}
_NOTES: Final = """\
Memory is the resident set (RSS) of the application. In-process, onnxruntime's
own code stays loaded; with onnx-dl the application does not import it.
The first load of each includes the import of onnxruntime. Calls: medians on the
same input; both take turns, so that load on this machine slows down both alike.
A call to a worker costs some tens of microseconds, whatever the model takes."""


class Way(NamedTuple):
    """The results of one way to do the work.  Sizes are bytes of the application's resident set."""

    before: int
    peak: int
    after: int
    outcomes: list[WorkResult]


def demo(console: Console) -> None:
    """Runs the demo.

    Raises:
        InstallationError: there is no onnxruntime, or it is too old.
    """
    installation.check()
    with tempfile.TemporaryDirectory(prefix="onnx-dl-demo-") as folder:
        large = _make_large(console, Path(folder))
        _title(console, "With onnx-dl: each model in a worker process")
        ours, readings, freed = _through_onnx_dl(console, large)
        _show_memory(console, readings)
        _title(console, "The same in-process: onnxruntime, then del and gc.collect()")
        theirs, calls = _in_process(console, large)
    _title(console, "Side by side")
    for line in table(ours, theirs, freed, calls):
        _print(console, line, "bold" if line == line.lstrip() else "")
    _print(console, f"\n{_NOTES}", "dim")


def _make_large(console: Console, folder: Path) -> Path:
    from rich.progress import Progress

    text = f"Making a model of {megabytes(LARGE_DATA_BYTES)} with random weights"
    if not console.is_terminal:
        _print(console, f"{text} ...")
        return make_large_model(folder)
    with Progress(console=console) as progress:
        task = progress.add_task(text, total=LARGE_DATA_BYTES)
        return make_large_model(folder, lambda done, _: progress.update(task, completed=done))


def _through_onnx_dl(console: Console, large: Path) -> tuple[Way, list[MemorySample], int]:
    started = time.time()
    events: list[ModelEvent] = []

    def show(event: ModelEvent) -> None:
        events.append(event)
        _print(console, event_line(event, started), _STYLES.get(event.type, ""))

    with ModelHost() as host, host.events() as stream, Recorder() as recorder:
        host.on_event(show)
        host.start()
        before = recorder.read().application
        proxies = {name: _proxy(name, large, host) for name in TTLS}
        outcomes = [_use(console, name, proxy) for name, proxy in proxies.items()]
        _wait(console, stream, "Waiting for the TTLs of wine and large to run out", len(TTLS) - 1)
        proxies["digits"].unload()
        _await_unloads(stream, 1)
        after = recorder.read().application
        peak = max(reading.application for reading in recorder.readings)
    freed = sum(event.freed or 0 for event in events)
    return Way(before, peak, after, outcomes), recorder.readings, freed


def _proxy(name: str, large: Path, host: ModelHost) -> InferenceSessionProxy:
    path = large if name == "large" else model_path(name)
    return InferenceSessionProxy(path, providers=["CPUExecutionProvider"], ttl=TTLS[name], host=host)


def _use(console: Console, name: str, proxy: InferenceSessionProxy) -> WorkResult:
    # With ttl=0 each call would load the model.  The block holds it; it unloads at the end of the block.
    started = time.perf_counter()
    with proxy.session() as session:
        load = time.perf_counter() - started
        outcome = churn(session) if name == "large" else predict(name, session)
    outcome = outcome._replace(load=load)
    _print(console, outcome_line(outcome, f"ttl {TTLS[name]:g}"))
    return outcome


def _wait(console: Console, stream: EventStream, text: str, unloads: int) -> None:
    if not console.is_terminal:
        _print(console, f"  {text} ...")
        _await_unloads(stream, unloads)
        return
    with console.status(f"{text} ..."):
        _await_unloads(stream, unloads)


def _await_unloads(stream: EventStream, count: int) -> None:
    while count:
        count -= stream.get(_DEADLINE).type == EventType.UNLOADED


def _in_process(console: Console, large: Path) -> tuple[Way, list[CallTimes]]:
    launch = boot.launch("demo", str(large))
    rss: dict[str, list[int]] = {"before": [], "peak": [], "loaded": [], "deleted": []}
    outcomes = []
    calls: list[CallTimes] = []
    with subprocess.Popen(launch.argv, env=launch.environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            report = json.loads(line)
            if report["when"] == "compared":
                calls = [CallTimes(*times) for times in report["calls"]]
                continue
            rss[report["when"]].append(report["rss"])
            if report["when"] == "loaded":
                outcomes.append(WorkResult(**{field: report[field] for field in WorkResult._fields}))
                _print(console, outcome_line(outcomes[-1], "in-process"))
            elif report["when"] == "deleted":
                _print(console, f"           after del and gc.collect(): RSS {megabytes(report['rss'])}")
                if len(rss["deleted"]) == len(TTLS):
                    _print(console, "\nComparing the times of calls ...")
    if process.returncode:
        raise SystemExit(f"the in-process part failed with exit code {process.returncode}")
    return Way(rss["before"][0], max(rss["peak"]), rss["deleted"][-1], outcomes), calls


# --- text --------------------------------------------------------------------------------------------------


def _print(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=style or None, markup=False, soft_wrap=True)


def _title(console: Console, text: str) -> None:
    _print(console, f"\n{text}\n{'-' * len(text)}", "bold")


def _show_memory(console: Console, readings: Sequence[MemorySample]) -> None:
    top = max(reading.others for reading in readings)
    span = readings[-1].at
    _print(console, f"\nMemory over {span:.1f} s; a full bar is {megabytes(top)}")
    for name, values in (
        ("workers and supervisor", [reading.others for reading in readings]),
        ("application", [reading.application for reading in readings]),
    ):
        _print(console, f"  {name:<22} |{sparkline(values, 50, top)}|", "cyan")


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
    return f"  [{event.at - started:5.2f} s] {event.type:<8} {name:<8} {', '.join(facts)}".rstrip()


def outcome_line(outcome: WorkResult, how: str) -> str:
    """One line for the results of a model."""
    return f"{outcome.model:<8} ({how}): {outcome.quality}; {outcome.example}"


def megabytes(count: int) -> str:
    """``12345678`` as ``12 MB``."""
    return f"{count / 1e6:.0f} MB"


def table(ours: Way, theirs: Way, freed: int, calls: Sequence[CallTimes]) -> list[str]:
    """The figures of both ways side by side, as lines of text; heads are not indented."""
    same = [a.digest == b.digest for a, b in zip(ours.outcomes, theirs.outcomes, strict=True)]
    memory = [
        ("application before", megabytes(ours.before), megabytes(theirs.before)),
        ("application at its peak", megabytes(ours.peak), megabytes(theirs.peak)),
        ("application after", megabytes(ours.after), megabytes(theirs.after)),
        ("left over", megabytes(ours.after - ours.before), megabytes(theirs.after - theirs.before)),
        ("given back by workers", megabytes(freed), "-"),
    ]
    loads = [
        (a.model, duration(a.load), duration(b.load))
        for a, b in zip(ours.outcomes, theirs.outcomes, strict=True)
    ]
    medians = [
        (f"{times.model}, batch of {times.batch}", duration(times.ours), duration(times.theirs))
        for times in calls
    ]
    return [
        *_rows("Memory", memory),
        *_rows("Loads", loads),
        *_rows("Calls, median", medians),
        f"Results equal, bit for bit: {sum(same)} of {len(same)} models",
    ]


def _rows(head: str, rows: Sequence[tuple[str, str, str]]) -> list[str]:
    lines = [f"  {label:<30}{left:>16}{right:>16}" for label, left, right in rows]
    return [f"{head:<32}{'onnx-dl':>16}{'in-process':>16}", *lines, ""]
