"""The supervisor's figures as families of Prometheus metrics.

The only importer of prometheus_client; imported only where metrics are asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

import onnx_dl
from onnx_dl.core.lifecycle import ModelState
from onnx_dl.core.status import ModelStatus, Usage
from onnx_dl.supervisor.metrics.counters import Facts, Times
from onnx_dl.transport.gauges import bound, bucket

_MEMORY: Final = ("rss", "pss", "private", "shared", "gpu")


def _doublings(first: int, last: int) -> list[int]:
    """The buckets that end at 2^first, ..., 2^last nanoseconds: a bucket never lies across such a bound."""
    return [bucket((1 << power) - 1) for power in range(first, last + 1)]


CALLS: Final = _doublings(15, 36)
"""From 33 µs to 69 s."""
LOADS: Final = _doublings(22, 39)
"""From 4 ms to 550 s."""


class Family(NamedTuple):
    """One family.  ``samples``: label values, and what ``make``'s ``add_metric`` takes after them."""

    make: Callable[..., Any]
    name: str
    labels: tuple[str, ...]
    text: str
    samples: Callable[[Facts], Iterable[tuple[Any, ...]]]

    def metric(self, facts: Facts) -> Metric:
        metric: Metric = self.make(self.name, self.text, labels=self.labels)
        for labels, *values in self.samples(facts):
            metric.add_metric(labels, *values)  # type: ignore[attr-defined]
        return metric


def cumulative(times: Times, ends: Sequence[int]) -> list[tuple[str, float]]:
    """How often it took at most so many seconds, for each of these buckets' bounds and ``+Inf``."""
    sums = list(itertools.accumulate(times.counts))
    return [*((repr(bound(end)), sums[end]) for end in ends), ("+Inf", sums[-1])]


def _unloads(facts: Facts) -> Iterator[tuple[list[str], int]]:
    for model, totals in facts.totals.items():
        for reason, count in totals.unloads.items():
            yield [model, reason], count


def _by_model(facts: Facts, figure: Callable[[ModelStatus], int | None]) -> Iterator[tuple[str, int]]:
    """Sums over the workers of one file: it may be loaded with several options."""
    sums: dict[str, int] = {}
    for status in facts.models:
        if status.worker_id is not None and (value := figure(status)) is not None:
            sums[status.model] = sums.get(status.model, 0) + value
    yield from sums.items()


def _memory(facts: Facts) -> Iterator[tuple[list[str], int]]:
    for kind in _MEMORY:
        for model, nbytes in _by_model(facts, lambda status, kind=kind: _bytes(status.usage, kind)):  # type: ignore[misc]
            yield [model, kind], nbytes


def _bytes(usage: Usage, kind: str) -> int | None:
    nbytes: int | None = getattr(usage, kind)
    return nbytes


def _states(facts: Facts) -> Iterator[tuple[list[str], int]]:
    states = [status.state for status in facts.models]
    return (([state], states.count(state)) for state in ModelState)


FAMILIES: Final = (
    Family(
        CounterMetricFamily,
        "onnx_dl_loads_total",
        ("model",),
        "Loads after which the model was ready.",
        lambda facts: (([model], sum(t.loads.counts)) for model, t in facts.totals.items()),
    ),
    Family(
        HistogramMetricFamily,
        "onnx_dl_load_seconds",
        ("model",),
        "How long these loads took.",
        lambda facts: (
            ([model], cumulative(t.loads, LOADS), t.loads.total) for model, t in facts.totals.items()
        ),
    ),
    Family(
        CounterMetricFamily,
        "onnx_dl_unloads_total",
        ("model", "reason"),
        "Workers that are gone: ttl, request, evicted, recycled, regrouped, crash or exit.",
        _unloads,
    ),
    Family(
        CounterMetricFamily,
        "onnx_dl_failures_total",
        ("model",),
        "Loads that failed and workers that died.",
        lambda facts: (([model], t.failures) for model, t in facts.totals.items()),
    ),
    Family(
        CounterMetricFamily,
        "onnx_dl_freed_bytes_total",
        ("model",),
        "Memory that only the model's workers held and that is the system's again.",
        lambda facts: (([model], t.freed) for model, t in facts.totals.items()),
    ),
    Family(
        HistogramMetricFamily,
        "onnx_dl_call_seconds",
        ("model",),
        "How long calls took in the model's workers, those that are gone included.",
        lambda facts: (
            ([model], cumulative(t.calls, CALLS), t.calls.total) for model, t in facts.totals.items()
        ),
    ),
    Family(
        GaugeMetricFamily,
        "onnx_dl_calls_in_progress",
        ("model",),
        "Calls and session() blocks under way.",
        lambda facts: (([model], busy) for model, busy in _by_model(facts, lambda status: status.busy)),
    ),
    Family(
        GaugeMetricFamily,
        "onnx_dl_worker_memory_bytes",
        ("model", "kind"),
        "Memory of the model's workers: rss, pss, private, shared (for tensors), gpu (where there is one).",
        _memory,
    ),
    Family(
        GaugeMetricFamily,
        "onnx_dl_memory_limit_bytes",
        (),
        "What all workers together may take; absent: there is no limit.",
        lambda facts: [] if facts.memory_limit is None else [([], facts.memory_limit)],
    ),
    Family(
        GaugeMetricFamily,
        "onnx_dl_memory_in_use_bytes",
        (),
        "What of it is taken or reserved.",
        lambda facts: [([], facts.memory_in_use)],
    ),
    Family(
        CounterMetricFamily,
        "onnx_dl_evictions_total",
        (),
        "Models that left to make room for others.",
        lambda facts: [([], facts.evictions)],
    ),
    Family(
        CounterMetricFamily,
        "onnx_dl_recycled_total",
        (),
        "Workers that were replaced because of max_memory or max_runs.",
        lambda facts: [([], facts.recycled)],
    ),
    Family(
        CounterMetricFamily,
        "onnx_dl_thrash_warnings_total",
        (),
        "Warnings that models are loaded again and again because they do not fit together.",
        lambda facts: [([], facts.thrash)],
    ),
    Family(
        GaugeMetricFamily,
        "onnx_dl_models",
        ("state",),
        "Models that are loaded, held or failing.",
        _states,
    ),
    Family(
        InfoMetricFamily,
        "onnx_dl",
        (),
        "The supervisor; written as onnx_dl_info.",
        lambda _: [([], {"version": onnx_dl.__version__})],
    ),
)


class _Collected(Collector):
    def __init__(self, facts: Facts) -> None:
        self._facts = facts

    def collect(self) -> Iterator[Metric]:
        return (family.metric(self._facts) for family in FAMILIES)


def render(facts: Facts, accept: str = "") -> tuple[bytes, str]:
    """The text and its content type; ``accept``: the header of that name, for OpenMetrics instead of
    Prometheus' own format."""
    encode, content_type = choose_encoder(accept)
    return encode(_Collected(facts)), content_type  # type: ignore[arg-type,unused-ignore]
