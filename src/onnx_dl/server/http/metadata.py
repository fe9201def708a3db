"""Answers to the protocol's questions about models and the server, as plain data.  Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from onnx_dl.server.interfaces import DurationCount, IndexRow, Served, TensorInfo, VersionStatistics

TRACE: Final = {
    "trace_level": ["OFF"], "trace_rate": "1000", "trace_count": "-1", "log_frequency": "0",
    "trace_file": "", "trace_mode": "triton",
}  # fmt: skip
"""There is no tracing; these are what Triton answers where it is off."""
LOGGING: Final = {
    "log_file": "", "log_info": True, "log_warning": True, "log_error": True, "log_verbose_level": 0,
    "log_format": "default",
}  # fmt: skip


def model_metadata(served: Served, versions: Sequence[str]) -> dict[str, Any]:
    return {
        "name": served.name,
        "versions": list(versions),
        "platform": served.platform,
        "inputs": [_tensor(info) for info in served.inputs],
        "outputs": [_tensor(info) for info in served.outputs],
    }


def _tensor(info: TensorInfo) -> dict[str, Any]:
    return {"name": info.name, "datatype": info.datatype, "shape": info.shape}


def index(rows: Iterable[IndexRow], *, is_ready: bool) -> list[dict[str, Any]]:
    """Rows of the repository's index.  ``is_ready``: of models only that are ready."""
    return [
        {name: value for name, value in msgspec.structs.asdict(row).items() if value}
        for row in rows
        if row.state == "READY" or not is_ready
    ]


def statistics(versions: Iterable[VersionStatistics]) -> dict[str, Any]:
    return {"model_stats": [_statistics(version) for version in versions]}


def _statistics(version: VersionStatistics) -> dict[str, Any]:
    nothing = DurationCount()
    return {
        "name": version.name,
        "version": version.version,
        "last_inference": version.last_inference_ms,
        "inference_count": version.inference_count,
        "execution_count": version.execution_count,
        "inference_stats": {
            "success": version.success,
            "fail": version.fail,
            "queue": version.queue,
            "compute_input": version.compute_input,
            "compute_infer": version.compute_infer,
            "compute_output": version.compute_output,
            "cache_hit": nothing,
            "cache_miss": nothing,
        },
        "batch_stats": [],
        "memory_usage": [],
        "response_stats": {},
    }
