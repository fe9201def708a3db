"""The status of a call that failed, and the caller of one."""

from __future__ import annotations

import logging
import re
from typing import Final, NoReturn
from urllib.parse import unquote

import grpc

from onnx_dl.server.interfaces import Caller
from onnx_dl.server.v2.failures import RequestFailure, internal

_LOG: Final = logging.getLogger(__name__)
_LONGEST: Final = 2000
"""Characters of a status, which travels in a header, and clients accept 8 KiB of headers."""
_LOOPBACK: Final = re.compile(
    r"ipv4:127\.|ipv6:(\[|%5B)?(::1|::ffff:127\.[\d.]+)(\]|%5D)|unix", re.IGNORECASE
)


def refuse(context: grpc.ServicerContext, failure: RequestFailure) -> NoReturn:
    """Ends the call with the failure's code and text.  Raises."""
    if failure.retry_after is not None:
        # What the retry policies of gRPC's own clients obey.
        milliseconds = str(round(failure.retry_after * 1000))
        context.set_trailing_metadata((("grpc-retry-pushback-ms", milliseconds),))
    context.abort(grpc.StatusCode[failure.grpc], text_of(failure))
    raise AssertionError("abort() returned")


def text_of(failure: RequestFailure) -> str:
    """The failure's text, as long as a status may be."""
    text = str(failure)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def unexpected(method: str, error: Exception) -> RequestFailure:
    """Our own fault.  Logs the traceback."""
    _LOG.error("%s failed", method, exc_info=error)
    return internal(f"{method} failed: {type(error).__name__}")


def caller_of(context: grpc.ServicerContext, *, has_certificates: bool) -> Caller:
    """The one who made the call.  ``has_certificates``: clients show certificates."""
    authorization = None
    for key, value in context.invocation_metadata():
        if key == "authorization":
            authorization = value if isinstance(value, str) else None
    subject = _subject(context) if has_certificates else None
    peer = context.peer()
    return Caller(authorization, _LOOPBACK.match(peer) is not None, subject, address_of(peer))


def address_of(peer: str) -> str:
    """The IP address in grpcio's name of a peer, such as ``ipv6:%5B::1%5D:50000``."""
    return unquote(peer.partition(":")[2].rpartition(":")[0]).strip("[]")


def _subject(context: grpc.ServicerContext) -> str | None:
    """Subject of the certificate that the client showed, or another of its names."""
    shown = context.auth_context()
    for key in ("x509_subject", "x509_common_name", "x509_subject_alternative_name"):
        if found := shown.get(key):
            return b", ".join(found).decode("utf-8", "replace")
    return "unnamed" if "x509_pem_cert" in shown else None


def time_left(context: grpc.ServicerContext) -> float | None:
    """Seconds until the client's deadline; None: it has set none."""
    left = context.time_remaining()
    return None if left is None or left > 1e9 else left
