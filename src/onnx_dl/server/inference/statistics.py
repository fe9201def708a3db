"""Counts and times of inferences, by version.

A request is counted before its answer is sent, so that a client which compares two statistics sees its own.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterable
from typing import NamedTuple

from onnx_dl.server.interfaces import DurationCount, VersionStatistics
from onnx_dl.server.v2.failures import Reason


class Durations(NamedTuple):
    """Nanoseconds of the steps of one inference.

    Attributes:
        queue: from the request's arrival until its run may begin: until the model is loaded.
        compute_input: checks of the request, and its tensors as arrays.
        compute_infer: the run, with the wait for a free connection to the worker, and the way there and back.
        compute_output: the results as tensors of the protocol, without the answer's bytes.
    """

    queue: int
    compute_input: int
    compute_infer: int
    compute_output: int


class Statistics:
    """The counts of one process.  Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._versions: dict[tuple[str, str], VersionStatistics] = {}

    def begin(self, name: str, version: str) -> VersionStatistics:
        """Count a request that waits or runs from now on.  Return the counts of its version, for the calls
        below."""
        with self._lock:
            counts = self._versions.get((name, version))
            if counts is None:
                counts = VersionStatistics(name=name, version=version)
                self._versions[name, version] = counts
            counts.pending += 1
        return counts

    def succeed(self, counts: VersionStatistics, rows: int, total: int, durations: Durations) -> None:
        """Count the end of a request that has a response.  ``rows``: of the batch, or 1; ``total``:
        nanoseconds of the whole request."""
        now = int(time.time() * 1000)
        with self._lock:
            counts.pending -= 1
            counts.last_inference_ms = now
            counts.inference_count += rows
            counts.execution_count += 1
            _add(counts.success, total)
            _add(counts.queue, durations.queue)
            _add(counts.compute_input, durations.compute_input)
            _add(counts.compute_infer, durations.compute_infer)
            _add(counts.compute_output, durations.compute_output)

    def fail(self, counts: VersionStatistics, reason: Reason, total: int) -> None:
        """Count the end of a request that failed.  ``total``: nanoseconds of the whole request."""
        with self._lock:
            counts.pending -= 1
            _add(counts.fail, total)
            counts.failures[reason] = counts.failures.get(reason, 0) + 1

    def withdraw(self, counts: VersionStatistics) -> None:
        """Undo :meth:`begin`: the request neither waits nor runs, and has not ended."""
        with self._lock:
            counts.pending -= 1

    def snapshot(self) -> list[VersionStatistics]:
        """Return a copy of all counts, sorted by name and version."""
        with self._lock:
            return [copy.deepcopy(self._versions[key]) for key in sorted(self._versions)]


def _add(count: DurationCount, ns: int) -> None:
    count.count += 1
    count.ns += ns


_TIMES = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")


def merged(snapshots: Iterable[Iterable[VersionStatistics]]) -> list[VersionStatistics]:
    """Return the sums of the snapshots of several processes, sorted by name and version."""
    found: dict[tuple[str, str], VersionStatistics] = {}
    for each in (version for snapshot in snapshots for version in snapshot):
        key = each.name, each.version
        if (total := found.get(key)) is None:
            found[key] = copy.deepcopy(each)
            continue
        total.last_inference_ms = max(total.last_inference_ms, each.last_inference_ms)
        for name in ("inference_count", "execution_count", "pending"):
            setattr(total, name, getattr(total, name) + getattr(each, name))
        for name in _TIMES:
            sums, more = getattr(total, name), getattr(each, name)
            sums.count += more.count
            sums.ns += more.ns
        for reason, count in each.failures.items():
            total.failures[reason] = total.failures.get(reason, 0) + count
    return [found[key] for key in sorted(found)]
