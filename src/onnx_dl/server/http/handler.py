"""Decisions about requests at their heads, and their answers."""

from __future__ import annotations

import asyncio
import functools
import logging
from typing import Final, NamedTuple

from starlette.applications import Starlette

from onnx_dl.server.http import compression, infer
from onnx_dl.server.http.answers import HttpAnswer, failed
from onnx_dl.server.http.asgi import call
from onnx_dl.server.http.head import Framing, Head, framing
from onnx_dl.server.http.limits import JSON_BYTES, OTHER_BODY
from onnx_dl.server.http.requests import HttpRequest
from onnx_dl.server.http.results import infer_answer, takes_long
from onnx_dl.server.http.targets import INFER, METRICS, Target, find_target
from onnx_dl.server.interfaces import Caller, Server
from onnx_dl.server.v2.bounds import AT_ONCE_BYTES, AT_ONCE_COPIED
from onnx_dl.server.v2.failures import RequestFailure, internal, not_found, unavailable
from onnx_dl.server.v2.operations import Scope

logger = logging.getLogger("onnx_dl.server")

_IN_THREAD: Final = 256 << 10
"""Bytes from which an answer is compressed in a thread."""


class NotAllowed(Exception):
    """The path has other methods."""

    def __init__(self, methods: list[str]) -> None:
        super().__init__()
        self.methods = methods


class Admitted(NamedTuple):
    """A request whose head was accepted.  ``most``: bytes of its body."""

    head: Head
    target: Target
    framing: Framing
    most: int

    @property
    def is_inference(self) -> bool:
        return self.target.route.name == INFER

    def request(self, body: memoryview, began: float) -> HttpRequest:
        """The request, when its body is there."""
        encoding, header_length = self.framing.encoding, self.framing.header_length
        return HttpRequest(self.head, self.target, body, encoding, header_length, began)


class Handler:
    """Answers requests of all connections of a listener."""

    def __init__(self, server: Server, app: Starlette, *, metrics_only: bool = False) -> None:
        self.server = server
        self._app = app
        self._metrics_only = metrics_only

    def admit(self, head: Head, caller: Caller) -> Admitted:
        """Decide about a request of which only the head is there.  ``caller``: without what the head says.

        Raises:
            RequestFailure: it is refused, and its body not read.
            NotAllowed: the path has other methods.
        """
        server = self.server
        target = find_target(head.target)
        if target is None or (self._metrics_only and target.route.name != METRICS):
            raise not_found("Not Found")
        operation = target.route.operations.get(head.method)
        if operation is None:
            raise NotAllowed(list(target.route.operations))
        if server.is_draining and operation.scope is not Scope.HEALTH:
            raise unavailable("The server is shutting down.")
        server.access.check_browser(head.text(b"host"), head.text(b"origin"))
        server.access.check(operation, caller._replace(authorization=head.text(b"authorization")))
        if target.route.name != INFER:
            return Admitted(head, target, framing(head, OTHER_BODY, OTHER_BODY), OTHER_BODY)
        server.models.find(target.names["model"], target.names.get("version", ""))
        most = server.options.max_body
        return Admitted(head, target, framing(head, most, min(most, JSON_BYTES)), most)

    def admit_again(self, admitted: Admitted, caller: Caller) -> None:
        """Decide about an inference whose head has the bytes of one that was admitted on the same connection:
        only what may have changed since is looked at.  Raises RequestFailure."""
        server, head, target = self.server, admitted.head, admitted.target
        if server.is_draining:
            raise unavailable("The server is shutting down.")
        authorization = head.text(b"authorization")
        if authorization is not None:
            caller = caller._replace(authorization=authorization)
        server.access.check(target.route.operations[head.method], caller)
        server.models.find(target.names["model"], target.names.get("version", ""))

    async def answer(self, request: HttpRequest) -> HttpAnswer:
        """Answer a request.  Raises nothing but CancelledError."""
        try:
            if request.target.route.name == INFER:
                return await self._infer(request)
            if request.encoding:
                await self._inflate(request, OTHER_BODY)
            return await call(self._app, request)
        except RequestFailure as failure:
            return self.refused(request.target, failure)
        except Exception:
            return self.fault(request.head.target)

    def refused(self, target: Target, failure: RequestFailure) -> HttpAnswer:
        """The answer to a request that was admitted and then refused.  An inference is counted."""
        if target.route.name == INFER:
            names = target.names
            self.server.inference.refused(names["model"], names.get("version", ""), failure)
        return failed(failure)

    def fault(self, request: bytes) -> HttpAnswer:
        """The answer to a request at which the server itself failed.  The log has the exception."""
        logger.exception("A request failed: %r", request[:200])
        return failed(internal("The server failed.  Its log says why."))

    async def _infer(self, request: HttpRequest) -> HttpAnswer:
        headers = request.head.headers
        timeout = infer.header_timeout(headers.get(b"x-request-timeout-ms"))
        if request.encoding:
            await self._inflate(request, self.server.options.max_body)
        names = request.target.names
        model, version = names["model"], names.get("version", "")
        if request.header_length == 0:
            served = self.server.models.find(model, version)
            read = functools.partial(infer.read_raw_request, served, version, request.body)
            is_long = len(request.body) > AT_ONCE_COPIED
        else:
            read = functools.partial(infer.read_request, model, version, request.body, request.header_length)
            is_long = infer.json_length(request.body, request.header_length) > AT_ONCE_BYTES
        inference, wanted = await asyncio.to_thread(read) if is_long else read()
        del read  # it has the body
        request.body = memoryview(b"")
        if timeout is not None:
            # What the body took is gone.
            waited = asyncio.get_running_loop().time() - request.began
            inference.timeout = max(0.0, timeout - waited)
        response = await self.server.inference.infer(inference)
        if takes_long(response, wanted):
            answer = await asyncio.to_thread(infer_answer, response, wanted)
        else:
            answer = infer_answer(response, wanted)
        encoding = compression.asked_encoding(headers.get(b"accept-encoding"))
        if encoding and answer.nbytes > _IN_THREAD:
            await asyncio.to_thread(compression.compress, answer, encoding)
        elif encoding:
            compression.compress(answer, encoding)
        return answer

    async def _inflate(self, request: HttpRequest, most: int) -> None:
        """Replace the body by what it is a compressed form of."""
        request.body = await asyncio.to_thread(
            compression.inflate,
            request.body,
            request.encoding,
            request.header_length,
            most,
            self.server.inference.allocate,
            lambda: request.is_given_up,
        )
