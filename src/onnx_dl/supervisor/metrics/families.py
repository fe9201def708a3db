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
from onnx_dl.core.text import file_name, is_path
from onnx_dl.core.version import __version__
from onnx_dl.supervisor.metrics.counters import Figures, Histogram, ModelCounts
from onnx_dl.transport.gauges import bound, bucket

Samples = Callable[[Figures], Iterable[tuple[object, ...]]]
"""Makes samples: label values, and the arguments of ``add_metric`` after them."""


def _doublings(first: int, last: int) -> list[int]:
    """Indexes of the buckets that end at 2^first, ..., 2^last nanoseconds; each power ends one."""
    return [bucket((1 << power) - 1) for power in range(first, last + 1)]


_MODEL: Final = ("model", "path")
"""Labels of a model."""

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


def _labels(model: str) -> list[str]:
    """Values of the labels ``model``, the file's name, and ``path``, which tells files of one name apart.

    A model given as bytes and a group have no path: their names are unique.
    """
    name = file_name(model)
    return [name, model if is_path(model) else ""]


def _unloads(figures: Figures) -> Iterator[tuple[list[str], int]]:
    for model, totals in figures.totals.items():
        for reason, count in totals.unloads.items():
            yield [*_labels(model), reason], count


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
            yield [*_labels(model), kind], nbytes


def _states(figures: Figures) -> Iterator[tuple[list[str], int]]:
    states = [status.state for status in figures.models]
    return (([state], states.count(state)) for state in ModelState)


def _per_model(
    make: Callable[..., Metric], name: str, text: str, values: Callable[[ModelCounts], tuple[object, ...]]
) -> Family:
    def samples(figures: Figures) -> Iterator[tuple[object, ...]]:
        return ((_labels(model), *values(totals)) for model, totals in figures.totals.items())

    return Family(make, name, _MODEL, text, samples)


def _total(make: Callable[..., Metric], name: str, text: str, figure: Callable[[Figures], object]) -> Family:
    return Family(make, name, (), text, lambda figures: [([], figure(figures))])


FAMILIES: Final = (
    _per_model(
        CounterMetricFamily,
        "onnx_dl_loads_total",
        "Successful loads: the model became ready.",
        lambda totals: (sum(totals.loads.counts),),
    ),
    _per_model(
        HistogramMetricFamily,
        "onnx_dl_load_seconds",
        "Duration of successful loads in seconds.",
        lambda totals: (cumulative(totals.loads, LOADS), totals.loads.total),
    ),
    Family(
        CounterMetricFamily,
        "onnx_dl_unloads_total",
        (*_MODEL, "reason"),
        "Workers that ended, by reason: ttl, request, evicted, recycled, regrouped, crash or exit.",
        _unloads,
    ),
    _per_model(
        CounterMetricFamily,
        "onnx_dl_failures_total",
        "Loads that failed, and workers that crashed.",
        lambda totals: (totals.failures,),
    ),
    _per_model(
        CounterMetricFamily,
        "onnx_dl_freed_bytes_total",
        "Private memory of ended workers, in bytes, now returned to the system.",
        lambda totals: (totals.freed,),
    ),
    _per_model(
        HistogramMetricFamily,
        "onnx_dl_call_seconds",
        "Duration of calls in the workers, in seconds, including workers that have ended.",
        lambda totals: (cumulative(totals.calls, CALLS), totals.calls.total),
    ),
    Family(
        GaugeMetricFamily,
        "onnx_dl_calls_in_progress",
        _MODEL,
        "Calls and session() blocks in progress.",
        lambda figures: (
            (_labels(model), busy) for model, busy in _by_model(figures, lambda status: status.busy)
        ),
    ),
    Family(
        GaugeMetricFamily,
        "onnx_dl_worker_memory_bytes",
        (*_MODEL, "kind"),
        "Memory of the model's workers in bytes, by kind: rss, pss, private, shared (for tensors) or gpu.",
        _memory,
    ),
    Family(
        GaugeMetricFamily,
        "onnx_dl_memory_limit_bytes",
        (),
        "Memory limit of all workers together, in bytes; absent if there is no limit.",
        lambda figures: [] if figures.memory_limit is None else [([], figures.memory_limit)],
    ),
    _total(
        GaugeMetricFamily,
        "onnx_dl_memory_in_use_bytes",
        "Memory that counts in the limit, in bytes: used by workers or reserved for loads.",
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
        "Warnings that models are reloaded often because they do not fit in the limit together.",
        lambda figures: figures.thrash,
    ),
    Family(
        GaugeMetricFamily,
        "onnx_dl_models",
        ("state",),
        "Models that are loaded, held by a client or failing, by state.",
        _states,
    ),
    _total(
        InfoMetricFamily,
        "onnx_dl",
        "Version of the supervisor.",
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
