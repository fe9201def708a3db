"""Processes that call: all servers are called by the same ones."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from typing import Any, NamedTuple

from benchmarks.serving.servers import Server
from benchmarks.serving.works import Work

_LEAD = 0.3
"""Seconds until clients that begin at one time begin."""


class Ran(NamedTuple):
    """What some clients did together.  ``times``: microseconds of all calls; ``per_second``: the sum of what
    each client reached; ``cpu``: seconds of all clients' processes."""

    times: list[float]
    per_second: float
    cpu: float


class Clients:
    """``count`` processes.  What is opened, is opened in each of them."""

    def __init__(self, count: int) -> None:
        command = [sys.executable, "-m", "benchmarks.serving.client"]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(count)
        ]

    def open(self, server: Server, way: str, work: Work, count: int) -> float:
        """Makes connections and one call each; returns the sum of the result.  Raises RuntimeError."""
        address = server.grpc if way.startswith("gRPC") else server.http
        arguments = {"key": _key(server, way, work), "way": way, "address": address, "work": work.told()}
        return float(self._ask("open", arguments, count)[0]["sum"])

    def run(self, server: Server, way: str, work: Work, count: int, seconds: float, most: int) -> Ran:
        """The first ``count`` clients at once, ``most`` calls each at most."""
        at = time.monotonic() + _LEAD if count > 1 else 0.0
        arguments = {"key": _key(server, way, work), "seconds": seconds, "at": at, "most": most}
        told = self._ask("run", arguments, count)
        times = [one for answer in told for one in answer["times"]]
        per_second = sum(len(answer["times"]) * 1e6 / sum(answer["times"]) for answer in told)
        return Ran(times, per_second, sum(answer["cpu"] for answer in told))

    def close(self, server: Server, way: str, work: Work, count: int) -> None:
        self._ask("close", {"key": _key(server, way, work)}, count)

    def _ask(self, command: str, arguments: dict[str, Any], count: int) -> list[dict[str, Any]]:
        asked = self._processes[:count]
        for process in asked:
            assert process.stdin is not None
            process.stdin.write(json.dumps([command, arguments]) + "\n")
            process.stdin.flush()
        answers = []
        for process in asked:
            assert process.stdout is not None
            answers.append(json.loads(process.stdout.readline() or '{"error": "a client has ended"}'))
        for answer in answers:
            if "error" in answer:
                raise RuntimeError(answer["error"])
        return answers

    def stop(self) -> None:
        """Lets them remove their shared memory; those that do not end are killed."""
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            process.wait()


def _key(server: Server, way: str, work: Work) -> str:
    return f"{server.name}|{way}|{work.name}"
