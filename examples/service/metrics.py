"""Metrics for Prometheus: the service's own, and those of the onnx-dl host, on one page."""

import logging
import os
import urllib.error
import urllib.request

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

import onnx_dl

_MILLISECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

REQUESTS = Counter("service_requests", "Requests by path and HTTP status.", ["path", "status"])
ACTIVE = Gauge("service_requests_in_progress", "Requests under way.", multiprocess_mode="livesum")
FRAMES = Counter("service_frames", "Frames that were answered.")
DETECTIONS = Counter("service_detections", "Digits that were found.")
STAGES = Histogram(
    "service_stage_seconds",
    "Time of one frame by stage: wait (for a turn), decode, detect, read.",
    ["stage"],
    buckets=_MILLISECONDS,
)
HOST_UP = Gauge(
    "service_host_metrics_up",
    "1 if the metrics of the onnx-dl host are on this page.",
    multiprocess_mode="max",
)


def page(host: onnx_dl.ModelHost) -> bytes:
    """Both sets of metrics in Prometheus' text format. Blocks for a few milliseconds, 5 seconds at most."""
    theirs = _of_host(host)
    HOST_UP.set(1 if theirs else 0)
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return generate_latest() + theirs
    all_workers = CollectorRegistry()  # several uvicorn workers: their sum
    multiprocess.MultiProcessCollector(all_workers)
    return generate_latest(all_workers) + theirs


def _of_host(host: onnx_dl.ModelHost) -> bytes:
    """The host's own page, which its supervisor serves; empty if it is not running or serves none."""
    try:
        address = host.snapshot().metrics
        if address is None:
            return b""
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
            return bytes(answer.read())
    except (urllib.error.URLError, TimeoutError, onnx_dl.OnnxDLError) as error:
        logging.getLogger(__name__).warning("no metrics of the onnx-dl host: %s", error)
        return b""
