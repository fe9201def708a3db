"""All paths but inferences, as a Starlette application.

Its routes come from the table in :mod:`onnx_dl.server.http.targets`.  Bodies are there and bounded, and the
caller's rights have been checked.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from onnx_dl.server.http import metadata
from onnx_dl.server.http.answers import HttpAnswer, failed, json_answer
from onnx_dl.server.http.targets import INFER, ROUTES
from onnx_dl.server.interfaces import Server
from onnx_dl.server.v2.failures import RequestFailure, invalid, not_found

_Kind = TypeVar("_Kind")


class _Index(msgspec.Struct):
    ready: bool = False


class _Parameters(msgspec.Struct):
    parameters: dict[str, Any] = {}


class _Registration(msgspec.Struct):
    key: str
    byte_size: int
    offset: int = 0


def application(server: Server) -> Starlette:
    """The application of a server."""
    models, regions = _Endpoints(server), _SharedMemory(server)
    routes = [
        Route(
            route.template,
            getattr(regions if hasattr(regions, route.name) else models, route.name),
            methods=list(route.operations),
        )
        for route in ROUTES
        if route.name != INFER
    ]
    return Starlette(routes=routes, exception_handlers={RequestFailure: _failed, HTTPException: _refused})


async def _failed(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestFailure)
    return _response(failed(error))


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _response(json_answer({"error": error.detail}, error.status_code))


def _response(answer: HttpAnswer) -> Response:
    headers = {name.decode(): value.decode() for name, value in answer.headers}
    return Response(b"".join(answer.parts), answer.status, headers, answer.kind.decode())


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def _read(request: Request, kind: type[_Kind]) -> _Kind:
    """The body as an object; an empty one has only defaults."""
    body = await request.body()
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(f"The request is not valid: {error}") from None
    except RecursionError:
        raise invalid("The JSON of the request is nested too deeply.") from None


class _Endpoints:
    """One method for each name in the table, but those of shared memory."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def live(self, _: Request) -> Response:
        return Response(media_type="application/json")

    async def ready(self, _: Request) -> Response:
        is_ready = self._server.is_ready and not self._server.is_draining
        return Response(status_code=200 if is_ready else 400, media_type="application/json")

    async def model_ready(self, request: Request) -> Response:
        try:
            self._server.models.check_ready(*_named(request))
        except RequestFailure as failure:
            # Triton's status; clients that wait for a model take any other for the end.
            raise RequestFailure(400, failure.grpc, str(failure)) from None
        return Response(media_type="application/json")

    async def server(self, _: Request) -> Response:
        server = self._server
        name = server.options.server_name
        return _json({"name": name, "version": server.version, "extensions": list(server.extensions)})

    async def metadata(self, request: Request) -> Response:
        name, version = _named(request)
        models = self._server.models
        versions = [version] if version else models.versions(name)
        return _json(metadata.model_metadata(models.find(name, version), versions))

    async def config(self, request: Request) -> Response:
        return _json(self._server.models.find(*_named(request)).config)

    async def statistics(self, request: Request) -> Response:
        name, version = _named(request)
        if name:
            self._server.models.find(name, version)
        return _json(metadata.statistics(await self._server.control.statistics(name, version)))

    async def state(self, request: Request) -> Response:
        return _json(await self._server.control.model_state(*_named(request)))

    async def index(self, request: Request) -> Response:
        asked = await _read(request, _Index)
        return _json(metadata.index(self._server.models.table.rows, is_ready=asked.ready))

    async def load(self, request: Request) -> Response:
        sent = await _read(request, _Parameters)
        await self._server.control.load(request.path_params["model"], sent.parameters)
        return Response(media_type="application/json")

    async def unload(self, request: Request) -> Response:
        sent = await _read(request, _Parameters)
        await self._server.control.unload(request.path_params["model"], sent.parameters)
        return Response(media_type="application/json")

    async def trace(self, request: Request) -> Response:
        if (name := request.path_params.get("model")) is not None:
            self._server.models.find(name)
        return await _settings(request, metadata.TRACE)

    async def logging(self, request: Request) -> Response:
        return await _settings(request, metadata.LOGGING)

    async def metrics(self, request: Request) -> Response:
        text, kind = await self._server.control.metrics(request.headers.get("accept", ""))
        return Response(text, media_type=None, headers={"content-type": kind})


class _SharedMemory:
    """The endpoints of shared memory."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def system_status(self, request: Request) -> Response:
        return _json(await self._server.control.region_status(request.path_params.get("region")))

    async def system_register(self, request: Request) -> Response:
        region = await _read(request, _Registration)
        await self._server.control.register_region(
            request.path_params["region"], region.key, region.offset, region.byte_size
        )
        return Response(media_type="application/json")

    async def system_unregister(self, request: Request) -> Response:
        await self._server.control.unregister_region(request.path_params.get("region"))
        return Response(media_type="application/json")

    async def cuda_status(self, request: Request) -> Response:
        if (name := request.path_params.get("region")) is not None:
            raise not_found(f"Unable to find cuda shared memory region: '{name}'")
        return _json([])

    async def cuda_register(self, _: Request) -> Response:
        raise invalid("Shared memory of CUDA is not supported.")

    async def cuda_unregister(self, _: Request) -> Response:
        return Response(media_type="application/json")


def _named(request: Request) -> tuple[str, str]:
    """Name and version in the path; empty where they are not."""
    return request.path_params.get("model", ""), request.path_params.get("version", "")


async def _settings(request: Request, settings: dict[str, Any]) -> Response:
    if request.method == "POST":
        changes: dict[str, Any] = await _read(request, dict[str, Any])
        if changes:
            raise invalid("These settings cannot be changed over the network.")
    return _json(settings)
