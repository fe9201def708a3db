"""Calls of the extensions "trace" and "logging": they are answered, and change nothing."""

from __future__ import annotations

from typing import Final

from onnx_dl.server.grpc.calls import UnaryCall, Wait
from onnx_dl.server.grpc.messages import Message, message
from onnx_dl.server.interfaces import Server
from onnx_dl.server.v2.failures import invalid
from onnx_dl.server.v2.operations import Operation

_TRACE: Final = {
    "trace_level": "OFF", "trace_rate": "1000", "trace_count": "-1", "log_frequency": "0", "trace_file": "",
    "trace_mode": "triton",
}  # fmt: skip
"""Triton's answer when nothing is traced."""
_LOG: Final[dict[str, bool | int | str]] = {
    "log_file": "", "log_info": True, "log_warning": True, "log_error": True, "log_verbose_level": 0,
    "log_format": "default",
}  # fmt: skip
_KINDS: Final = {bool: "bool_param", int: "uint32_param", str: "string_param"}


def _trace(server: Server, request: Message, wait: Wait) -> Message:
    if request.settings:
        raise invalid("this server does not trace requests, so that trace settings cannot be changed")
    if request.model_name:
        server.models.find(request.model_name)
    answer = message("inference.TraceSettingResponse")()
    for name, value in _TRACE.items():
        answer.settings[name].value.append(value)
    return answer


def _logging(server: Server, request: Message, wait: Wait) -> Message:
    if request.settings:
        raise invalid("log settings of this server cannot be changed while it runs")
    answer = message("inference.LogSettingsResponse")()
    for name, value in _LOG.items():
        setattr(answer.settings[name], _KINDS[type(value)], value)
    return answer


CALLS: Final = {
    "TraceSetting": UnaryCall(Operation.SETTINGS, message("inference.TraceSettingRequest"), _trace),
    "LogSettings": UnaryCall(Operation.SETTINGS, message("inference.LogSettingsRequest"), _logging),
}
