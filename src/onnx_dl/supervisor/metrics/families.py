"""The supervisor's figures as families of Prometheus metrics.

The only importer of prometheus_client; imported only if metrics are wanted.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from onnx_dl.core.lifecycle import ModelState
from onnx_dl.core.status import ModelStatus
from onnx_dl.core.version import __version__
from onnx_dl.supervisor.metrics.counters import Figures, Histogram, ModelCounts
from onnx_dl.transport.gauges import bound, bucket

Samples = Callable[[Figures], Iterable[tuple[object, ...]]]
"""Makes samples: label values, and the arguments of ``add_metric`` after them."""


def _doublings(first: int, last: int) -> list[int]:
    """Indexes of the buckets that end at 2^first, ..., 2^last nanoseconds; each power ends one."""
    return [bucket((1 << power) - 1) for power in range(first, last + 1)]


CALLS: Final = _doublings(15, 36)
"""Buckets of calls: from 33 µs to 69 s."""
LOADS: Final = _doublings(22, 39)
"""Buckets of loads: from 4 ms to 550 s."""


class Family(NamedTuple):
    """One family of metrics."""

    make: Callable[..., Metric]
    name: str
    labels: tuple[str, ...]
    text: str
    samples: Samples

    def metric(self, figures: Figures) -> Metric:
        metric = self.make(self.name, self.text, labels=self.labels)
        for labels, *values in self.samples(figures):
            metric.add_metric(labels, *values)  # type: ignore[attr-defined]
        return metric


def cumulative(times: Histogram, ends: Sequence[int]) -> list[tuple[str, float]]:
    """Number of durations up to each bucket's bound (in seconds, as text), and up to ``+Inf``."""
    sums = list(itertools.accumulate(times.counts))
    return [*((repr(bound(end)), sums[end]) for end in ends), ("+Inf", sums[-1])]


def _unloads(figures: Figures) -> Iterator[tuple[list[str], int]]:
    for model, totals in figures.totals.items():
        for reason, count in totals.unloads.items():
            yield [model, reason], count


def _by_model(figures: Figures, figure: Callable[[ModelStatus], int | None]) -> Iterator[tuple[str, int]]:
    """Sums over the workers of one file: it may be loaded with several options."""
    sums: dict[str, int] = {}
    for status in figures.models:
        if status.worker_id is not None and (value := figure(status)) is not None:
            sums[status.model] = sums.get(status.model, 0) + value
    yield from sums.items()


def _memory(figures: Figures) -> Iterator[tuple[list[str], int]]:
    for kind in ("rss", "pss", "private", "shared", "gpu"):
        for model, nbytes in _by_model(figures, operator.attrgetter(f"usage.{kind}")):
            yield [model, kind], nbytes


def _states(figures: Figures) -> Iterator[tuple[list[str], int]]:
    states = [status.state for status in figures.models]
    return (([state], states.count(state)) for state in ModelState)


def _per_model(
    make: Callable[..., Metric], name: str, text: str, values: Callable[[ModelCounts], tuple[object, ...]]
) -> Family:
    def samples(figures: Figures) -> Iterator[tuple[object, ...]]:
        return (([model], *values(totals)) for model, totals in figures.totals.items())

    return Family(make, name, ("model",), text, samples)


def _total(make: Callable[..., Metric], name: str, text: str, figure: Callable[[Figures], object]) -> Family:
    return Family(make, name, (), text, lambda figures: [([], figure(figures))])


FAMILIES: Final = (
    _per_model(
        CounterMetricFamily,
        "onnx_dl_loads_total",
        "Loads after which the model was ready.",
        lambda totals: (sum(totals.loads.counts),),
    ),
    _per_model(
        HistogramMetricFamily,
        "onnx_dl_load_seconds",
        "How long these loads took.",
        lambda totals: (cumulative(totals.loads, LOADS), totals.loads.total),
    ),
    Family(
        CounterMetricFamily,
        "onnx_dl_unloads_total",
        ("model", "reason"),
        "Workers that are gone: ttl, request, evicted, recycled, regrouped, crash or exit.",
        _unloads,
    ),
    _per_model(
        CounterMetricFamily,
        "onnx_dl_failures_total",
        "Loads that failed and workers that died.",
        lambda totals: (totals.failures,),
    ),
    _per_model(
        CounterMetricFamily,
        "onnx_dl_freed_bytes_total",
        "Memory that only the model's workers held and that they have given back to the system.",
        lambda totals: (totals.freed,),
    ),
    _per_model(
        HistogramMetricFamily,
        "onnx_dl_call_seconds",
        "How long calls took in the model's workers, those that are gone included.",
        lambda totals: (cumulative(totals.calls, CALLS), totals.calls.total),
    ),
    Family(
        GaugeMetricFamily,
        "onnx_dl_calls_in_progress",
        ("model",),
        "Calls and session() blocks under way.",
        lambda figures: (([model], busy) for model, busy in _by_model(figures, lambda status: status.busy)),
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
        "Memory that all workers together may use; absent: there is no limit.",
        lambda figures: [] if figures.memory_limit is None else [([], figures.memory_limit)],
    ),
    _total(
        GaugeMetricFamily,
        "onnx_dl_memory_in_use_bytes",
        "Memory of all workers that counts in the limit: used or reserved.",
        lambda figures: figures.memory_in_use,
    ),
    _total(
        CounterMetricFamily,
        "onnx_dl_evictions_total",
        "Models that were unloaded to make room for others.",
        lambda figures: figures.evictions,
    ),
    _total(
        CounterMetricFamily,
        "onnx_dl_recycled_total",
        "Workers that were replaced because of max_memory or max_runs.",
        lambda figures: figures.recycled,
    ),
    _total(
        CounterMetricFamily,
        "onnx_dl_thrash_warnings_total",
        "Warnings that models are loaded again and again because they do not fit together.",
        lambda figures: figures.thrash,
    ),
    Family(
        GaugeMetricFamily,
        "onnx_dl_models",
        ("state",),
        "Models that are loaded, held or failing.",
        _states,
    ),
    _total(
        InfoMetricFamily,
        "onnx_dl",
        "The supervisor; written as onnx_dl_info.",
        lambda _: {"version": __version__},
    ),
)


class _Collected(Collector):
    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        return (family.metric(self._figures) for family in FAMILIES)


def render(figures: Figures, accept: str = "") -> tuple[bytes, str]:
    """The page and its content type, by the request's Accept header: Prometheus' format, or OpenMetrics."""
    encode, content_type = choose_encoder(accept)
    return encode(_Collected(figures)), content_type  # type: ignore[arg-type,unused-ignore]
