"""``python -m benchmarks``: all figures in one table.

``--quick`` for a first impression, ``--only calls cold …`` for a part, ``--json FILE`` and ``--png FILE`` to
keep them.  Ways that need a package which is not installed are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

from benchmarks import breakdown, calls, cold, memory, reclaim, report
from benchmarks.models import cases
from benchmarks.others import OTHERS
from benchmarks.report import Row
from onnx_dl import ModelHost


def all_calls(rounds: int) -> list[Row]:
    rows = []
    for case in cases():
        # By then, the others have the machine to themselves: their idle processes would be in the way.
        with ModelHost() as host:
            rows += calls.measure(case, host, rounds, [])
    return rows


def against_others(rounds: int) -> list[Row]:
    others = [name for name in OTHERS if name != "Ray actor" or importlib.util.find_spec("ray")]
    rows = []
    for case in cases()[:3]:
        with ModelHost() as host:
            measured = calls.measure(case, host, max(3, rounds // 3), others)
        # Asked of above; here only to compare.
        rows += [row._replace(work=f"{row.work} (all ways)", limit=None) for row in measured]
    return rows


def streams(rounds: int) -> list[Row]:
    with ModelHost() as host:
        return [
            *calls.voice_activity(host, rounds),
            *calls.crowd(host, max(3, rounds // 3)),
            *calls.crowd_floor(max(3, rounds // 3)),
        ]


PARTS: dict[str, Callable[[int], list[Row]]] = {
    "calls": all_calls,
    "streams": streams,
    "cold": lambda rounds: [*cold.small(rounds), *cold.large(rounds)],
    "memory": lambda rounds: [*memory.beyond_the_session(), *memory.three_workers(), *memory.idle()],
    "breakdown": breakdown.measure,
    "others": against_others,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*PARTS, "reclaim"], default=[*PARTS, "reclaim"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    arguments = parser.parse_args(argv)
    rows: list[Row] = []
    for part in arguments.only:
        if part in PARTS:
            rows += PARTS[part](3 if arguments.quick else arguments.rounds)
    print(report.table(rows))
    if "reclaim" in arguments.only:
        print()
        reclaim.main([])
    if arguments.json:
        arguments.json.write_text(json.dumps(report.as_json(rows), indent=1))
    if arguments.png:
        report.draw(rows, arguments.png)


if __name__ == "__main__":
    main()
