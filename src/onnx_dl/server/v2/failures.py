"""The one way in which a request is refused or fails: an exception with the status of both protocols.

A client's own mistake is a 4xx with a sentence.  5xx is the server's alone.
"""

from __future__ import annotations

from typing import Literal

Reason = Literal["REJECTED", "CANCELED", "BACKEND", "OTHER"]
"""Values of the label ``reason`` of ``nv_inference_request_failure``."""


class RequestFailure(Exception):
    """A request that gets an error for an answer.

    Attributes:
        http: status of HTTP.
        grpc: name of the status code of gRPC, such as ``INVALID_ARGUMENT``.
        retry_after: seconds after which the client may try again; None: trying again does not help.
        reason: label for the metrics.
        is_counted: the statistics of its model have it.
    """

    is_counted = False

    def __init__(
        self,
        http: int,
        grpc: str,
        text: str,
        *,
        retry_after: float | None = None,
        reason: Reason = "OTHER",
    ) -> None:
        super().__init__(text)
        self.http = http
        self.grpc = grpc
        self.retry_after = retry_after
        self.reason: Reason = reason


def invalid(text: str) -> RequestFailure:
    """The request is not valid."""
    return RequestFailure(400, "INVALID_ARGUMENT", text)


def unauthenticated(text: str) -> RequestFailure:
    """The request has no token that is known."""
    return RequestFailure(401, "UNAUTHENTICATED", text)


def forbidden(text: str) -> RequestFailure:
    """The token, or the server's options, do not allow this."""
    return RequestFailure(403, "PERMISSION_DENIED", text)


def not_found(text: str) -> RequestFailure:
    """There is no such model, region or path."""
    return RequestFailure(404, "NOT_FOUND", text)


def passed(text: str) -> RequestFailure:
    """The client's own deadline passed."""
    return RequestFailure(408, "DEADLINE_EXCEEDED", text, reason="CANCELED")


def cancelled(text: str = "The caller has gone.") -> RequestFailure:
    """The caller has gone; nobody reads this."""
    return RequestFailure(499, "CANCELLED", text, reason="CANCELED")


def too_large(text: str) -> RequestFailure:
    """A body, or a part of it, exceeds a limit."""
    return RequestFailure(413, "RESOURCE_EXHAUSTED", text, reason="REJECTED")


def too_many(text: str, retry_after: float = 1.0) -> RequestFailure:
    """A queue, or the memory for requests, is full."""
    return RequestFailure(429, "RESOURCE_EXHAUSTED", text, retry_after=retry_after, reason="REJECTED")


def unavailable(text: str, retry_after: float = 1.0) -> RequestFailure:
    """The model cannot be loaded now, there is no memory for it, or the server drains."""
    return RequestFailure(503, "UNAVAILABLE", text, retry_after=retry_after, reason="BACKEND")


def internal(text: str) -> RequestFailure:
    """The server, or a worker, failed."""
    return RequestFailure(500, "INTERNAL", text, reason="BACKEND")
