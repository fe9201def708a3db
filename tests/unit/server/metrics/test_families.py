"""Triton's families, in both formats, and the host's page beside them."""

from __future__ import annotations

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse_classic

from onnx_dl.core.status import Snapshot
from onnx_dl.server.interfaces import DurationCount, VersionStatistics
from onnx_dl.server.metrics.families import readable, render
from onnx_dl.server.metrics.machine import GpuFigures, MachineFigures
from onnx_dl.supervisor.metrics import families as hosts
from onnx_dl.supervisor.metrics.counters import Figures

OPEN = "application/openmetrics-text;version=1.0.0"
STATISTICS = [
    VersionStatistics(
        name='a"b', version="2", inference_count=30, execution_count=10, pending=4,
        success=DurationCount(10, 5_000_999), fail=DurationCount(3, 9), queue=DurationCount(10, 1000),
        compute_input=DurationCount(10, 2000), compute_infer=DurationCount(10, 3000),
        compute_output=DurationCount(10, 4000), failures={"OTHER": 2, "CANCELED": 1},
    )
]  # fmt: skip
MACHINE = MachineFigures(
    0.5, 100, 40, (GpuFigures("GPU-1", 100.0, 300.0, 7.0, 0.25, 80, 20), GpuFigures("2"))
)
TRITONS = {
    "nv_inference_request_success": 10,
    "nv_inference_count": 30,
    "nv_inference_exec_count": 10,
    "nv_inference_request_duration_us": 5000,
    "nv_inference_queue_duration_us": 1,
    "nv_inference_compute_input_duration_us": 2,
    "nv_inference_compute_infer_duration_us": 3,
    "nv_inference_compute_output_duration_us": 4,
    "nv_inference_pending_request_count": 4,
}
GPUS = {
    "nv_gpu_power_usage": 100.0, "nv_gpu_power_limit": 300.0, "nv_energy_consumption": 7.0,
    "nv_gpu_utilization": 0.25, "nv_gpu_memory_total_bytes": 80.0, "nv_gpu_memory_used_bytes": 20.0,
}  # fmt: skip


def host_page(accept: str) -> str:
    return hosts.render(Figures({}, [], 0, 0, 0, None, 0), accept)[0].decode()


@pytest.mark.parametrize("accept", ["", "text/plain;version=0.0.4", OPEN])
def test_the_page_has_tritons_names_and_values(accept: str) -> None:
    page, content_type = render(STATISTICS, None, host_page(accept), accept, MACHINE)
    is_open = accept == OPEN
    assert content_type.startswith("application/openmetrics-text" if is_open else "text/plain")
    families = {each.name: each for each in (parse_open if is_open else parse_classic)(page.decode())}
    for name, value in TRITONS.items():
        (sample,) = families[name].samples
        assert (sample.labels, sample.value) == ({"model": 'a"b', "version": "2"}, value)
        # The parser of the classic format adds _total to all counters; the page has none.
        assert f'\n{name}{{model="a\\"b",version="2"}} {float(value)}\n' in page.decode()
        kind = "gauge" if "pending" in name else "unknown" if is_open else "counter"
        assert families[name].type == kind
    failures = families["nv_inference_request_failure"].samples
    assert {sample.labels["reason"]: sample.value for sample in failures} == {
        "REJECTED": 0, "CANCELED": 1, "BACKEND": 0, "OTHER": 2,
    }  # fmt: skip
    for name, value in GPUS.items():
        (sample,) = families[name].samples
        assert (sample.labels, sample.value) == ({"gpu_uuid": "GPU-1"}, value)
    assert families["nv_cpu_utilization"].samples[0].value == 0.5
    assert families["nv_cpu_memory_total_bytes"].samples[0].value == 100
    assert families["nv_cpu_memory_used_bytes"].samples[0].value == 40
    # The host's own, once each, also the mark at the end.
    assert any(name.startswith("onnx_dl_") for name in families)
    types = [line for line in page.decode().splitlines() if line.startswith("# TYPE ")]
    assert len(set(types)) == len(types)
    assert page.count(b"# EOF") == is_open


@pytest.mark.parametrize("accept", ["", OPEN])
def test_without_the_hosts_page_its_snapshot_tells_most(accept: str) -> None:
    snapshot = Snapshot(seq=1, supervisor_pid=1, models=[], memory_limit=1000, memory_in_use=600)
    parse = parse_open if accept else parse_classic
    for text in ("", host_page("" if accept else OPEN)):  # a page in the other format cannot stand beside it
        page, _ = render([], snapshot, text, accept, MACHINE)
        families = {each.name: each for each in parse(page.decode())}
        assert families["onnx_dl_memory_in_use_bytes"].samples[0].value == 600
        assert families["onnx_dl_memory_limit_bytes"].samples[0].value == 1000
        assert page.count(b"# EOF") == bool(accept)


def test_without_a_host_the_page_is_there() -> None:
    page, _ = render(STATISTICS, None, "", "", MachineFigures())
    assert b"nv_inference_count" in page
    assert b"onnx_dl_" not in page
    assert b"nv_cpu" not in page
    assert b"nv_gpu" not in page


def test_this_machine_is_read() -> None:
    page, _ = render([], None, "")
    families = {each.name: each for each in parse_classic(page.decode())}
    assert families["nv_cpu_memory_total_bytes"].samples[0].value > 1 << 20
    assert 0 <= families["nv_cpu_utilization"].samples[0].value <= 1


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (OPEN, "application/openmetrics-text; version=1.0.0"),
        ("text/plain;version=1.0.0;escaping=allow-utf-8", "text/plain"),
        ("application/openmetrics-text;version=one", "text/plain; version=0.0.4"),
        ("text/plain;version=1.x", "text/plain; version=0.0.4"),
        ("application/openmetrics-text;version=1.0.0\xe9", "text/plain; version=0.0.4"),
        ("application/openmetrics-text;escaping=\xe9", "text/plain; version=0.0.4"),
        (";=,=;,;version", "text/plain; version=0.0.4"),
    ],
)
def test_any_header_has_a_page(accept: str, kind: str) -> None:
    known = readable(accept)
    page, content_type = render(STATISTICS, None, host_page(known), known, MACHINE)
    assert content_type.startswith(kind)
    parse = parse_open if "openmetrics" in kind else parse_classic
    assert list(parse(page.decode()))
