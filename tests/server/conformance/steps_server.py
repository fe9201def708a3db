"""Health, metadata, configuration, statistics, trace and logging settings."""

from __future__ import annotations

from typing import Any

from tests.server.conformance.clients import Kit
from tests.server.conformance.registry import pair, step


@step
def server_is_live(kit: Kit) -> Any:
    return kit.call("is_server_live")


@step
def server_is_ready(kit: Kit) -> Any:
    return kit.call("is_server_ready")


@step
def server_metadata(kit: Kit) -> Any:
    return kit.call("get_server_metadata")


@step
def model_is_ready(kit: Kit) -> Any:
    asked = [
        ("simple",),
        ("simple", "1"),
        ("versions", "1"),
        ("versions", "3"),
        ("versions", "2"),
        ("unknown",),
    ]
    return [kit.call("is_model_ready", *one) for one in asked]


@step
def model_metadata(kit: Kit) -> Any:
    return [kit.call("get_model_metadata", name) for name in ("simple", "versions", "types", "text")]


@step
def model_metadata_of_a_version(kit: Kit) -> Any:
    return kit.call("get_model_metadata", "versions", "1")


@step
def model_metadata_of_an_unknown_model(kit: Kit) -> Any:
    return kit.call("get_model_metadata", "unknown")


@step
def model_metadata_of_an_unknown_version(kit: Kit) -> Any:
    return kit.call("get_model_metadata", "versions", "2")


@step
def model_metadata_of_a_version_that_is_no_number(kit: Kit) -> Any:
    return kit.call("get_model_metadata", "versions", "first")


@step
def model_config(kit: Kit) -> Any:
    return kit.call("get_model_config", "simple")


@step
def model_config_of_an_unknown_model(kit: Kit) -> Any:
    return kit.call("get_model_config", "unknown")


@step
def statistics_of_a_model(kit: Kit) -> Any:
    kit.infer("simple", pair(kit))
    return kit.call("get_inference_statistics", "simple")


@step
def statistics_of_all_models(kit: Kit) -> Any:
    found = kit.call("get_inference_statistics")
    return sorted((one["name"], one["version"]) for one in found["model_stats"])


@step
def statistics_count_rows_and_failures(kit: Kit) -> Any:
    def counts() -> tuple[int, int, int, int]:
        (one,) = kit.call("get_inference_statistics", "simple")["model_stats"]
        inferred, executed = one.get("inference_count", 0), one.get("execution_count", 0)
        stats = one["inference_stats"]
        counted = [int(stats.get(which, {}).get("count", 0)) for which in ("success", "fail")]
        return (int(inferred), int(executed), counted[0], counted[1])

    before = counts()
    kit.infer("simple", pair(kit, 3))
    return [after - was for after, was in zip(counts(), before, strict=True)]


@step
def statistics_of_an_unknown_model(kit: Kit) -> Any:
    return kit.call("get_inference_statistics", "unknown")


@step
def trace_settings(kit: Kit) -> Any:
    return kit.call("get_trace_settings")


@step
def trace_settings_of_a_model(kit: Kit) -> Any:
    return kit.call("get_trace_settings", "simple")


@step
def trace_settings_changed(kit: Kit) -> Any:
    return kit.call("update_trace_settings", settings={"trace_rate": "1000"})


@step
def log_settings(kit: Kit) -> Any:
    return kit.call("get_log_settings")


@step
def log_settings_changed(kit: Kit) -> Any:
    return kit.call("update_log_settings", {"log_verbose_level": 0})
