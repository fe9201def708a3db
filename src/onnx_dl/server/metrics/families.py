"""Triton's families of metrics, and the text of the host's beside them.

Triton's counters have no ``_total``.  Prometheus' classic format takes that; in OpenMetrics a counter without
it is not allowed, so these families have no type there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from prometheus_client.core import GaugeMetricFamily, Metric, UnknownMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from onnx_dl.core.status import Snapshot
from onnx_dl.server.interfaces import VersionStatistics
from onnx_dl.server.metrics.machine import MACHINE, GpuFigures, MachineFigures

REASONS: Final = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
_MODEL: Final = ("model", "version")
_END: Final = "# EOF"

Labels = Sequence[str]


class CounterFamily(NamedTuple):
    """One of Triton's counters of a version."""

    name: str
    text: str
    value: Callable[[VersionStatistics], int]


COUNTERS: Final = (
    CounterFamily(
        "nv_inference_request_success",
        "Number of successful inference requests, all batch sizes",
        lambda version: version.success.count,
    ),
    CounterFamily(
        "nv_inference_count",
        "Number of inferences performed (a batch of n counts as n inferences)",
        lambda version: version.inference_count,
    ),
    CounterFamily(
        "nv_inference_exec_count",
        "Number of model executions performed",
        lambda version: version.execution_count,
    ),
    CounterFamily(
        "nv_inference_request_duration_us",
        "Cumulative duration of successful inference requests in microseconds",
        lambda version: version.success.ns // 1000,
    ),
    CounterFamily(
        "nv_inference_queue_duration_us",
        "Cumulative time in microseconds that requests waited until their model was loaded",
        lambda version: version.queue.ns // 1000,
    ),
    CounterFamily(
        "nv_inference_compute_input_duration_us",
        "Cumulative time in microseconds of checks of requests and of making their inputs",
        lambda version: version.compute_input.ns // 1000,
    ),
    CounterFamily(
        "nv_inference_compute_infer_duration_us",
        "Cumulative time in microseconds of runs, with the way to the worker and back",
        lambda version: version.compute_infer.ns // 1000,
    ),
    CounterFamily(
        "nv_inference_compute_output_duration_us",
        "Cumulative time in microseconds of making outputs",
        lambda version: version.compute_output.ns // 1000,
    ),
)
_FAILURES: Final = "nv_inference_request_failure"
COUNTER_NAMES: Final = (*(family.name for family in COUNTERS), _FAILURES, "nv_energy_consumption")

_GPU: Final[tuple[tuple[str, str, Callable[[GpuFigures], float | None]], ...]] = (
    ("nv_gpu_power_usage", "GPU power usage in watts", lambda gpu: gpu.power_usage),
    ("nv_gpu_power_limit", "GPU power management limit in watts", lambda gpu: gpu.power_limit),
    (
        "nv_energy_consumption",
        "GPU energy consumption in joules since the driver was loaded",
        lambda gpu: gpu.energy,
    ),
    ("nv_gpu_utilization", "GPU utilization rate [0.0 - 1.0]", lambda gpu: gpu.utilization),
    ("nv_gpu_memory_total_bytes", "GPU total memory, in bytes", lambda gpu: gpu.memory_total),
    ("nv_gpu_memory_used_bytes", "GPU used memory, in bytes", lambda gpu: gpu.memory_used),
)


def render(
    statistics: Sequence[VersionStatistics],
    snapshot: Snapshot | None,
    host_text: str,
    accept: str = "",
    machine: MachineFigures | None = None,
) -> tuple[bytes, str]:
    """The page and its content type.

    Args:
        statistics: of all versions that are served, of all processes together.
        snapshot: of the host; None: it does not answer.
        host_text: the host's own page, fetched with the same ``accept``; empty: there is none, and the most
            important of its figures are taken from ``snapshot``.
        accept: the request's Accept header: Prometheus' classic format, or OpenMetrics.
        machine: None: this machine's, read now.
    """
    encode, content_type = choose_encoder(accept)
    is_open = content_type.startswith("application/openmetrics-text")
    if host_text and host_text.rstrip().endswith(_END) != is_open:  # in the other format
        host_text = ""
    families = [*_inference(statistics), *_machine(MACHINE.read() if machine is None else machine)]
    if not host_text and snapshot is not None:
        families += _host(snapshot)
    own: str = encode(_Families(families)).decode()  # type: ignore[arg-type,unused-ignore]
    own = own.removesuffix(f"{_END}\n") if is_open else _with_counters(own)
    host_text = host_text and host_text.rstrip("\n") + "\n"
    if is_open and not host_text:
        host_text = f"{_END}\n"
    return (own + host_text).encode(), content_type


def readable(accept: str) -> str:
    """The header ``accept``; empty, which asks for the classic format, where it cannot be read."""
    try:
        choose_encoder(accept)
    except (TypeError, ValueError):  # prometheus_client compares versions that are no numbers
        return ""
    return accept if accept.isascii() and accept.isprintable() else ""


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)


def _with_counters(text: str) -> str:
    """Give Triton's counters their type, which prometheus_client gives only to names that end in _total."""
    for name in COUNTER_NAMES:
        text = text.replace(f"# TYPE {name} untyped\n", f"# TYPE {name} counter\n")
    return text


def _inference(statistics: Sequence[VersionStatistics]) -> Iterator[Metric]:
    for name, text, value in COUNTERS:
        counter = UnknownMetricFamily(name, text, labels=_MODEL)
        for version in statistics:
            counter.add_metric(_labels(version), value(version))
        yield counter
    failures = UnknownMetricFamily(
        _FAILURES, "Number of failed inference requests", labels=(*_MODEL, "reason")
    )
    pending = GaugeMetricFamily(
        "nv_inference_pending_request_count",
        "Number of inference requests that wait or run",
        labels=_MODEL,
    )
    for version in statistics:
        for reason in REASONS:
            failures.add_metric([*_labels(version), reason], version.failures.get(reason, 0))
        pending.add_metric(_labels(version), version.pending)
    yield from (failures, pending)


def _labels(version: VersionStatistics) -> Labels:
    return version.name, version.version


def _machine(figures: MachineFigures) -> Iterator[Metric]:
    for name, text, value in (
        ("nv_cpu_utilization", "CPU utilization rate [0.0 - 1.0]", figures.utilization),
        ("nv_cpu_memory_total_bytes", "CPU total memory (RAM), in bytes", figures.memory_total),
        ("nv_cpu_memory_used_bytes", "CPU used memory (RAM), in bytes", figures.memory_used),
    ):
        if value is not None:
            yield GaugeMetricFamily(name, text, value=value)
    for name, text, of in _GPU if figures.gpus else ():
        make = UnknownMetricFamily if name in COUNTER_NAMES else GaugeMetricFamily
        family = make(name, text, labels=("gpu_uuid",))
        for gpu in figures.gpus:
            if (figure := of(gpu)) is not None:
                family.add_metric([gpu.uuid], figure)
        yield family


def _host(snapshot: Snapshot) -> Iterator[Metric]:
    """The host's families that a snapshot has; their names are those of the host's own page."""
    yield GaugeMetricFamily(
        "onnx_dl_memory_in_use_bytes",
        "Memory that counts in the limit, in bytes: used by workers or reserved for loads.",
        value=snapshot.memory_in_use,
    )
    if snapshot.memory_limit is not None:
        yield GaugeMetricFamily(
            "onnx_dl_memory_limit_bytes",
            "Memory limit of all workers together, in bytes; absent if there is no limit.",
            value=snapshot.memory_limit,
        )
    models = GaugeMetricFamily(
        "onnx_dl_models", "Models that are loaded, held by a client or failing, by state.", labels=("state",)
    )
    states = [status.state for status in snapshot.models]
    for state in sorted(set(states)):
        models.add_metric([state], states.count(state))
    yield models
