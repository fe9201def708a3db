"""``python -m benchmarks``: all figures in one table, with what was asked of them."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

# Models load plainly unless it is the load cache that is measured, and the user's is left alone.
os.environ["ONNX_DL_CACHE"] = "off"

from benchmarks import (
    bound,
    breakdown,
    calls,
    capped_host,
    caps,
    cold,
    crowd,
    crowd_of_models,
    memory,
    reclaim,
    report,
    spinning,
    streams,
    values,
)
from benchmarks.models import cases, voice_activity, voice_shaped
from benchmarks.report import Row

ROUNDS, QUICK = 15, 3
CASES: Final = cases()


def _stream(rounds: int) -> list[Row]:
    case = voice_activity()
    if case is None:
        return [Row("silero-vad, one stream", calls.OURS, None, note="silero-vad is not installed")]
    return calls.measure(case, rounds)


def _all_ways(rounds: int) -> list[Row]:
    return [row for key in ("tiny", "5mb", "64mb") for row in calls.against_others(CASES[key], rounds)]


def _parts(published: str | None, quick: bool) -> dict[str, Callable[[int], list[Row]]]:
    """What can be asked for; each takes the number of rounds and gives rows."""
    some = 1 if quick else 3
    return {
        **{key: lambda rounds, case=case: calls.measure(case, rounds) for key, case in CASES.items()},
        "vad": _stream,
        "shaped": lambda rounds: calls.measure(voice_shaped(), rounds),
        "streams": streams.measure,
        "values": values.measure,
        "bound": bound.measure,
        "crowd": lambda rounds: [
            *crowd.measure(CASES["tiny"], 2000, rounds),
            *crowd.measure(CASES["conv"], 6, rounds),
        ],
        "crowd_of_models": lambda rounds: crowd_of_models.measure(rounds // 2 or 1, 1 if quick else 4),
        "cold": lambda rounds: cold.small(CASES["tiny"], rounds),
        "large": lambda rounds: cold.large(rounds // 2),
        "memory": lambda rounds: [
            *memory.beyond_the_session(CASES["tiny"], some),
            *memory.three_workers(),
            *memory.left_after_ttl(published),
        ],
        "idle": lambda rounds: memory.idle(CASES, 2.0 if quick else 10.0),
        "caps": lambda rounds: [*caps.cost(CASES["tiny"], rounds), *caps.overshoot(rounds)],
        "spinning": lambda rounds: [
            *spinning.idle(CASES, 2.0 if quick else 20.0),
            *spinning.measure(CASES["tiny"], rounds),
            *spinning.measure(CASES["conv"], rounds),
        ],
        "others": lambda rounds: _all_ways(max(QUICK, rounds // 3)),
    }


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parts = [*_parts(None, True), "breakdown", "reclaim", "capped"]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="onnx-dl beside onnxruntime.")
    parser.add_argument(
        "--only", nargs="+", choices=parts, default=parts, metavar="NAME", help=f"of {', '.join(parts)}"
    )
    parser.add_argument("--rounds", type=int, default=None, help=f"({ROUNDS})")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} rounds: does it run? not: how fast?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw what each way adds to a call")
    parser.add_argument("--published", metavar="PYTHON", help="an interpreter that has onnx-dl 0.1.0")
    return parser.parse_args(argv)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _reclaim(quick: bool) -> list[dict[str, Any]]:
    from onnx_dl.demo.assets import make_large_model

    with tempfile.TemporaryDirectory() as folder:
        return reclaim.measure(make_large_model(Path(folder)), 1 if quick else 3)


def _capped(quick: bool) -> list[dict[str, Any]]:
    if quick:
        return capped_host.measure(capped_host.QUICK, 1)
    return capped_host.measure(capped_host.Setup(), capped_host.ROUNDS)


def main(argv: list[str] | None = None) -> None:
    arguments = _arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # and end all children
    rounds = arguments.rounds or (QUICK if arguments.quick else ROUNDS)
    found: dict[str, Any] = {"machine": report.machine(), "rounds": rounds, "rows": []}
    rows: list[Row] = []
    try:
        _measure(arguments, rounds, rows, found)
    finally:  # what was measured before something failed was measured
        _report(arguments, rows, found)


def _measure(arguments: argparse.Namespace, rounds: int, rows: list[Row], found: dict[str, Any]) -> None:
    parts = _parts(arguments.published, arguments.quick)
    for name in arguments.only:
        started = time.monotonic()
        if name in parts:
            rows += parts[name](rounds)
        elif name == "breakdown":
            found[name] = breakdown.measure(rounds)
        elif name == "reclaim":
            found[name] = _reclaim(arguments.quick)
        else:
            found[name] = _capped(arguments.quick)
        _say(f"{name}: {time.monotonic() - started:.0f} s")


def _report(arguments: argparse.Namespace, rows: list[Row], found: dict[str, Any]) -> None:
    if rows:
        print(report.table(rows))
    if "breakdown" in found:
        print(f"\n{breakdown.table(found['breakdown'])}")
    if "reclaim" in found:
        print(f"\n{reclaim.table(found['reclaim'])}")
    if "capped" in found:
        print(f"\n{capped_host.table(found['capped'])}")
    report.write(rows, found, arguments.json)
    if arguments.png:
        report.draw(rows, arguments.png)


if __name__ == "__main__":
    main()
