"""Calls about the server and its models: health, metadata, configuration, statistics."""

from __future__ import annotations

from typing import Final

from google.protobuf import json_format

from onnx_dl.server.grpc.calls import UnaryCall, Wait
from onnx_dl.server.grpc.messages import POOL, Message, message
from onnx_dl.server.interfaces import DurationCount, Server, TensorInfo, VersionStatistics
from onnx_dl.server.v2.failures import RequestFailure
from onnx_dl.server.v2.operations import Operation

_ModelMetadata: Final = message("inference.ModelMetadataResponse")
_ModelConfig: Final = message("inference.ModelConfigResponse")
_Statistics: Final = message("inference.ModelStatisticsResponse")


def _live(server: Server, request: Message, wait: Wait) -> Message:
    return message("inference.ServerLiveResponse")(live=True)


def _ready(server: Server, request: Message, wait: Wait) -> Message:
    return message("inference.ServerReadyResponse")(ready=server.is_ready and not server.is_draining)


def _model_ready(server: Server, request: Message, wait: Wait) -> Message:
    try:
        server.models.check_ready(request.name, request.version)
    except RequestFailure:
        is_ready = False
    else:
        is_ready = not server.is_draining
    return message("inference.ModelReadyResponse")(ready=is_ready)


def _metadata(server: Server, request: Message, wait: Wait) -> Message:
    return message("inference.ServerMetadataResponse")(
        name=server.options.server_name, version=server.version, extensions=list(server.extensions)
    )


def _model_metadata(server: Server, request: Message, wait: Wait) -> Message:
    served = server.models.find(request.name, request.version)
    return _ModelMetadata(
        name=served.name,
        versions=[request.version] if request.version else server.models.versions(served.name),
        platform=served.platform,
        inputs=[_tensor(info) for info in served.inputs],
        outputs=[_tensor(info) for info in served.outputs],
    )


def _tensor(info: TensorInfo) -> Message:
    return _ModelMetadata.TensorMetadata(name=info.name, datatype=info.datatype, shape=info.shape)


def _model_config(server: Server, request: Message, wait: Wait) -> Message:
    served = server.models.find(request.name, request.version)
    answer = _ModelConfig()
    json_format.ParseDict(served.config, answer.config, ignore_unknown_fields=True, descriptor_pool=POOL)
    return answer


def _statistics(server: Server, request: Message, wait: Wait) -> Message:
    counted = wait(server.control.statistics(request.name, request.version))
    return _Statistics(model_stats=[_of_version(counts) for counts in counted])


def _of_version(counts: VersionStatistics) -> Message:
    return message("inference.ModelStatistics")(
        name=counts.name,
        version=counts.version,
        last_inference=counts.last_inference_ms,
        inference_count=counts.inference_count,
        execution_count=counts.execution_count,
        inference_stats=message("inference.InferStatistics")(
            success=_duration(counts.success),
            fail=_duration(counts.fail),
            queue=_duration(counts.queue),
            compute_input=_duration(counts.compute_input),
            compute_infer=_duration(counts.compute_infer),
            compute_output=_duration(counts.compute_output),
            cache_hit=_duration(DurationCount()),
            cache_miss=_duration(DurationCount()),
        ),
    )


def _duration(duration: DurationCount) -> Message:
    return message("inference.StatisticDuration")(count=duration.count, ns=duration.ns)


CALLS: Final = {
    "ServerLive": UnaryCall(Operation.SERVER_LIVE, message("inference.ServerLiveRequest"), _live),
    "ServerReady": UnaryCall(Operation.SERVER_READY, message("inference.ServerReadyRequest"), _ready),
    "ModelReady": UnaryCall(Operation.MODEL_READY, message("inference.ModelReadyRequest"), _model_ready),
    "ServerMetadata": UnaryCall(
        Operation.SERVER_METADATA, message("inference.ServerMetadataRequest"), _metadata
    ),
    "ModelMetadata": UnaryCall(
        Operation.MODEL_METADATA, message("inference.ModelMetadataRequest"), _model_metadata
    ),
    "ModelConfig": UnaryCall(Operation.MODEL_CONFIG, message("inference.ModelConfigRequest"), _model_config),
    "ModelStatistics": UnaryCall(
        Operation.STATISTICS, message("inference.ModelStatisticsRequest"), _statistics
    ),
}
