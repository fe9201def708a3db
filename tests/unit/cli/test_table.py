"""What commands show, from fixed snapshots, in consoles of fixed widths."""

from __future__ import annotations

import time
from io import StringIO
from typing import Any

import pytest
from rich.console import Console, RenderableType

from onnx_dl.cli import ps, table
from onnx_dl.cli.doctor import report
from onnx_dl.cli.doctor.checks import Finding, Mark
from onnx_dl.cli.hosts import check_alive, default_name
from onnx_dl.cli.models import load_line
from onnx_dl.cli.table import History
from onnx_dl.client.launcher import no_host
from onnx_dl.core import snapshot_table, text
from onnx_dl.core.lifecycle import ModelState
from onnx_dl.core.status import ModelStatus, Snapshot, Usage
from onnx_dl.errors import SupervisorDied
from onnx_dl.protocol.codec import PROTOCOL_VERSION
from onnx_dl.transport.running_hosts import RunningHost


def status(model: str = "/models/asr.onnx", **fields: Any) -> ModelStatus:
    default: dict[str, Any] = {
        "key": f"key of {model}",
        "state": ModelState.READY,
        "worker_id": 1,
        "pid": 4711,
        "leases": 2,
        "ttl": 60.0,
        "usage": Usage(rss=53_100_000, private=7_000_000, pss=17_200_000),
        "loads": 1,
        "failures": 0,
        "retry_after": 0.0,
        "idle": 12.0,
        "runs": 20,
        "p50": 0.000066,
    }
    return ModelStatus(model=model, **default | fields)


FAILED = status(
    "/models/bad.onnx", state=ModelState.FAILED, worker_id=None, pid=None, leases=0, ttl=None, usage=Usage(),
    failures=2, retry_after=0.966, idle=None, runs=0, p50=None,
)  # fmt: skip


def snapshot(*models: ModelStatus, **fields: Any) -> Snapshot:
    default: dict[str, Any] = {"host": "default", "memory_limit": 2_000_000_000, "memory_in_use": 312_400_000}
    return Snapshot(7, 4700, list(models), **default | fields)


def lines(picture: RenderableType, width: int = 120) -> list[str]:
    """As they stand on a terminal of that width."""
    file = StringIO()
    Console(width=width, file=file).print(picture)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def cells(model: ModelStatus) -> dict[str, str]:
    """What the table says of one model, by column."""
    head, (row,) = snapshot_table.rows(snapshot(model))
    return dict(zip(head, row, strict=True))


# --- ps ----------------------------------------------------------------------------------------------------


def test_the_whole_picture() -> None:
    assert lines(table.overview(snapshot(status(), FAILED), 92), 92) == [
        "Shared host 'default', supervisor pid 4700",
        "MODEL     STATE                     PID    IDLE  TTL LEFT      RSS      PSS  RUNS    P50",
        "asr.onnx  ready                    4711  12.0 s    48.0 s  53.1 MB  17.2 MB    20  66 µs",
        "bad.onnx  failed, retry in 966 ms     -       -         -        -        -     0      -",
        "Memory: 312.4 MB in use of 2000.0 MB (16 %)",
    ]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 120, 200])
def test_it_fits(width: int) -> None:
    """No line is wrapped, and state and name are there, however narrow the terminal is."""
    seen = lines(table.overview(snapshot(status(), status("b" * 80), memory_limit=None), width), width)
    assert max(map(len, seen)) <= width
    heads = [line for line in seen if line.startswith("MODEL")]
    assert len(heads) == 1
    rows = seen[seen.index(heads[0]) + 1 :][:2]
    assert "ready" in rows[0] and "ready" in rows[1]
    assert rows[1].startswith("bbb")


def test_a_narrow_terminal_loses_what_is_worth_least() -> None:
    head = lines(table.overview(snapshot(status(), FAILED), 60), 60)[1]
    assert head.split() == ["MODEL", "STATE", "IDLE", "TTL", "LEFT", "PSS"]
    head = lines(table.overview(snapshot(status()), 60), 60)[1]
    assert head.split() == ["MODEL", "STATE", "PID", "IDLE", "TTL", "LEFT", "PSS", "P50"]


def test_a_column_without_any_value_is_omitted() -> None:
    with_gpu = status(usage=Usage(rss=1, pss=1, gpu=5_000_000))
    assert "GPU" not in lines(table.overview(snapshot(status(p50=None)), 200), 200)[1]
    assert "P50" not in lines(table.overview(snapshot(status(p50=None)), 200), 200)[1]
    assert "GPU" in lines(table.overview(snapshot(with_gpu), 90), 90)[1]


def test_names_lose_their_middle() -> None:
    """Names of similar models differ at the end."""
    assert table.shortened("asr.onnx", 8) == "asr.onnx"
    assert table.shortened("speech-large-1.onnx", 13) == "spee…e-1.onnx"
    assert table.shortened("\u65e5\u672c\u8a9e\u8a9e.onnx", 9) == "\u65e5….onnx"
    assert table.shortened("abc", 1) == "…"


def test_no_models() -> None:
    assert lines(table.overview(snapshot(memory_in_use=0), 120))[1:] == [
        "No models. Load one with: onnx-dl load MODEL",
        "Memory: 0.0 MB in use of 2000.0 MB (0 %)",
    ]


def test_whose_host() -> None:
    assert lines(table.overview(snapshot(host="batch"), 80))[0] == "Shared host 'batch', supervisor pid 4700"
    assert lines(table.overview(snapshot(host=None), 80))[0] == "Private host, supervisor pid 4700"


def test_no_limit() -> None:
    assert snapshot_table.memory_line(snapshot(memory_limit=None)) == "Memory: 312.4 MB in use, no limit"


def test_a_host_that_does_not_run_says_nothing_of_its_limit() -> None:
    idle = Snapshot(7, None, [])
    assert snapshot_table.memory_line(idle) == "Memory: 0.0 MB in use"


@pytest.mark.parametrize(
    ("fields", "title", "expected"),
    [
        ({}, "IDLE", "12.0 s"),
        ({"idle": None, "busy": 1}, "IDLE", "in use"),
        ({"idle": None}, "IDLE", "unused"),
        ({"pid": None, "idle": None}, "IDLE", "-"),
        ({}, "TTL LEFT", "48.0 s"),
        ({"idle": 61.0}, "TTL LEFT", "0 µs"),
        ({"idle": None, "busy": 1}, "TTL LEFT", "1 m"),
        ({"ttl": -1.0}, "TTL LEFT", "stays"),
        ({"ttl": 0.0, "idle": None}, "TTL LEFT", "after use"),
        ({"isolated": False}, "STATE", "ready, in-process"),
        ({"ttl": None}, "TTL LEFT", "-"),
        ({"pinned": True}, "PINNED", "yes"),
        ({"usage": Usage(gpu=5_000_000)}, "GPU", "5.0 MB"),
        ({"state": ModelState.FAILED}, "STATE", "failed"),
        ({"state": ModelState.FAILED, "retry_after": 2.5}, "STATE", "failed, retry in 2.5 s"),
        ({"state": ModelState.LOADING, "retry_after": 2.5}, "STATE", "loading"),
    ],
)
def test_a_cell(fields: dict[str, Any], title: str, expected: str) -> None:
    assert cells(status(**fields))[title] == expected


def test_hosts_of_several_versions() -> None:
    """Of each: what it is, whether it can be asked, what becomes of it."""
    before = RunningHost(name="a", protocol=None, pid=1, started=1.0, managed=True)
    ours = RunningHost(name="a", protocol=PROTOCOL_VERSION, pid=2, started=2.0, package="1.0")
    later = RunningHost(name="a", protocol=PROTOCOL_VERSION + 1, pid=3, started=3.0, package="2.0")
    first, second, third = ps.host_lines([before, ours, later])
    assert first.startswith("Host: onnx-dl, protocol version 4 or older, pid 1, since ")
    assert "This version of onnx-dl cannot connect to it." in first and "--all-versions ends it." in first
    assert second.startswith(f"Host: onnx-dl 1.0, protocol version {PROTOCOL_VERSION}, pid 2, since ")
    assert second.endswith(". It ends when its clients have gone.")
    assert third.endswith("This version of onnx-dl cannot connect to it. It stays, as any host does.")
    assert ps.host_lines([ours]) == [second.removesuffix(" It ends when its clients have gone.")]
    assert ps.host_lines([]) == []


def test_hosts_of_several_versions_as_data() -> None:
    ours = RunningHost(name="a", protocol=PROTOCOL_VERSION, pid=2, started=2.0, package="1.0")
    later = RunningHost(
        name="a", protocol=PROTOCOL_VERSION + 1, pid=3, started=3.0, package="2.0", managed=True
    )
    first, second = ps.host_data([ours, later])
    assert first.pop("since") < second.pop("since") < time.time()
    assert first == {
        "name": "a", "protocol": PROTOCOL_VERSION, "package": "1.0", "pid": 2, "kept": False,
        "reachable": True, "leaving": True,
    }  # fmt: skip
    assert second == {
        "name": "a", "protocol": PROTOCOL_VERSION + 1, "package": "2.0", "pid": 3, "kept": True,
        "reachable": False, "leaving": False,
    }  # fmt: skip
    assert ps.host_data([RunningHost(name="a", protocol=None, pid=1)])[0]["since"] is None


def test_names_are_not_taken_for_markup() -> None:
    assert "[red].onnx" in lines(table.overview(snapshot(status("/m/[red].onnx")), 120))[2]


# --- top ---------------------------------------------------------------------------------------------------


def with_pss(pss: int) -> ModelStatus:
    return status(usage=Usage(rss=1, pss=pss))


def test_memory_over_time() -> None:
    history = History(10)
    for second, pss in enumerate((0, 50_000_000, 100_000_000)):
        now = snapshot(with_pss(pss), memory_limit=200_000_000, memory_in_use=pss)
        history.add(now, 100.0 + second)
    seen = lines(table.live(now, history, 80), 80)[5:]
    assert seen[0].split() == ["MEMORY", "LAST", "2.0", "s", "NOW", "PEAK"]
    assert seen[1].startswith("asr.onnx ") and seen[1].endswith(" ▄█  100.0 MB  100.0 MB")
    assert seen[2].startswith("all models ") and seen[2].endswith(" ▂▄  100.0 MB  100.0 MB")
    assert seen[3] == "A full bar is 100.0 MB for one model, and the limit for all models."


def test_top_before_the_first_load_and_the_first_call() -> None:
    """It says what to do, and has no empty columns."""
    history = History(10)
    history.add(snapshot(memory_in_use=0), 1.0)
    empty = lines(table.live(snapshot(memory_in_use=0), history, 80), 80)
    assert empty[1:] == [
        "No models. Load one with: onnx-dl load MODEL",
        "Memory: 0.0 MB in use of 2000.0 MB (0 %)",
    ]
    uncalled = snapshot(status(runs=0, p50=None))
    history = History(10)
    history.add(uncalled, 1.0)
    seen = lines(table.live(uncalled, history, 80), 80)
    assert seen[1].split()[-1] == "RUNS" and "No calls yet." in seen[4]
    assert any(line.startswith("MEMORY") and "OVER TIME" in line for line in seen)


def test_a_model_that_is_gone_keeps_its_line_as_long_as_it_is_remembered() -> None:
    history = History(2)
    history.add(snapshot(with_pss(8)), 0.0)
    history.add(snapshot(), 1.0)
    assert [line.values for line in history.models()] == [[8, 0]]
    history.add(snapshot(), 2.0)
    assert history.models() == []
    assert history.seconds == 1.0


def test_memory_is_not_remembered_for_ever() -> None:
    history = History(3)
    for second in range(100):
        history.add(snapshot(memory_in_use=second), float(second))
    assert history.in_use == [97, 98, 99]
    assert history.seconds == 2.0


@pytest.mark.parametrize("width", [40, 60, 120])
def test_the_live_picture_fits(width: int) -> None:
    history = History(100)
    for second in range(100):
        history.add(snapshot(status(), status("x" * 70), FAILED), float(second))
    seen = lines(table.live(snapshot(status(), FAILED), history, width), width)
    assert max(map(len, seen)) <= width
    assert any(line.startswith("all models") for line in seen)


# --- words -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.000066, "66 µs"), (0.0123, "12 ms"), (1.25, "1.2 s"), (59.94, "59.9 s"), (59.96, "1 m"),
        (75.4, "1 m 15 s"), (3599.6, "1 h 0 m"), (86_400.0, "24 h 0 m"),
    ],
)  # fmt: skip
def test_durations(seconds: float, expected: str) -> None:
    assert text.duration(seconds) == expected


@pytest.mark.parametrize(
    ("models", "names"),
    [
        ([], []),
        ([("/a/x.onnx", "1")], ["x.onnx"]),
        ([("/a/x.onnx", "1"), ("/b/x.onnx", "2"), ("/b/y.onnx", "3")], ["a/x.onnx", "b/x.onnx", "y.onnx"]),
        ([("/a/m/x", "1"), ("/b/m/x", "2"), ("/a/n/x", "3")], ["a/m/x", "b/m/x", "n/x"]),
        ([("x.onnx", "1"), ("/a/x.onnx", "2")], ["x.onnx", "a/x.onnx"]),
        ([("/a/x", "123456789"), ("/a/x", "987654321")], ["x (12345678)", "x (98765432)"]),
        ([("bytes:0123456789abcdef", "1")], ["bytes:01234567"]),
    ],
)
def test_names(models: list[tuple[str, str]], names: list[str]) -> None:
    assert text.short_names(models) == names


def test_a_line_over_time() -> None:
    assert text.sparkline([0, 1, 50, 100, 200], 5, 100) == " ▁▄██"
    assert text.sparkline([], 3, 1) == "   "
    assert text.sparkline([1, 9, 1, 1], 2, 9) == "█▁"
    assert text.sparkline([1, 1], 2, 0) == "  "
    assert str(table._line([1, 1], 4, 1)[0]) == "  ██"
    assert str(table._line(list(range(100)), 4, 99)[0]) == "▂▄▆█"


def test_what_load_says() -> None:
    path = "/models/asr.onnx"
    assert load_line(status()) == f"ready {path}, pid 4711, PSS 17.2 MB, ttl 60 s"
    assert load_line(status(ttl=-1.0, pinned=True)).endswith(", PSS 17.2 MB, stays, pinned")
    assert load_line(status(ttl=None)).endswith("17.2 MB")


def test_which_host() -> None:
    assert default_name({}) == default_name({"ONNX_DL_HOST": ""}) == "default"
    assert default_name({"ONNX_DL_HOST": "batch"}) == "batch"
    assert "onnx-dl supervise, " in no_host("default") and "load MODEL, " in no_host("default")
    assert "onnx-dl supervise --host batch, " in no_host("batch")
    assert "onnx-dl load MODEL --host batch, " in no_host("batch")
    other = RunningHost(name="batch", protocol=PROTOCOL_VERSION + 1, pid=7, package="9.9")
    ours = f"this version of onnx-dl (protocol version {PROTOCOL_VERSION})"
    assert no_host("batch", [other]).startswith(
        f"No shared host named 'batch' runs for {ours}. "
        f"There is one of another version: onnx-dl 9.9, protocol version {PROTOCOL_VERSION + 1}, pid 7. "
        "Start one with onnx-dl "
    )


def test_a_host_that_has_ended() -> None:
    with pytest.raises(SupervisorDied, match="has ended"):
        check_alive(Snapshot(0, None, []))


# --- doctor ------------------------------------------------------------------------------------------------


def test_a_checklist() -> None:
    findings = [
        Finding("python", Mark.OK, "3.11.7"),
        Finding("provider X", Mark.WARNING, "is [slow]", "Do this."),
        Finding("kernel", Mark.WARNING, "old"),
        Finding("onnxruntime", Mark.PROBLEM, "none"),
    ]
    assert lines(report.checklist(findings), 60) == [
        "ok       python       3.11.7",
        "warning  provider X   is [slow]",
        "                      Do this.",
        "warning  kernel       old",
        "problem  onnxruntime  none",
        "1 ok, 2 warnings, 1 problem",
    ]
    assert report.has_problems(findings) and not report.has_problems(findings[:3])
    assert report.summary(findings[:1]) == "1 ok, no warning, no problem"
