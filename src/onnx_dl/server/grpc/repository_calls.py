"""Calls of the extension "model_repository": index, load, unload."""

from __future__ import annotations

from typing import Final

from onnx_dl.server.grpc.calls import UnaryCall, Wait
from onnx_dl.server.grpc.messages import Message, message
from onnx_dl.server.grpc.requests import parameters_of
from onnx_dl.server.interfaces import Server
from onnx_dl.server.v2.failures import RequestFailure
from onnx_dl.server.v2.operations import Operation

_Index: Final = message("inference.RepositoryIndexResponse")


def _index(server: Server, request: Message, wait: Wait) -> Message:
    _check(request)
    rows = [row for row in server.models.table.rows if row.state == "READY" or not request.ready]
    return _Index(
        models=[
            _Index.ModelIndex(name=row.name, version=row.version, state=row.state, reason=row.reason)
            for row in rows
        ]
    )


def _load(server: Server, request: Message, wait: Wait) -> Message:
    _check(request)
    wait(server.control.load(request.model_name, parameters_of(request.parameters)))
    return message("inference.RepositoryModelLoadResponse")()


def _unload(server: Server, request: Message, wait: Wait) -> Message:
    _check(request)
    wait(server.control.unload(request.model_name, parameters_of(request.parameters)))
    return message("inference.RepositoryModelUnloadResponse")()


def _check(request: Message) -> None:
    if request.repository_name:
        raise RequestFailure(400, "UNIMPLEMENTED", "'repository_name' specification is not supported")


CALLS: Final = {
    "RepositoryIndex": UnaryCall(
        Operation.REPOSITORY_INDEX, message("inference.RepositoryIndexRequest"), _index
    ),
    "RepositoryModelLoad": UnaryCall(
        Operation.REPOSITORY_LOAD, message("inference.RepositoryModelLoadRequest"), _load
    ),
    "RepositoryModelUnload": UnaryCall(
        Operation.REPOSITORY_UNLOAD, message("inference.RepositoryModelUnloadRequest"), _unload
    ),
}
