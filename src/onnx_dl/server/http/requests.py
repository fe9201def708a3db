"""One request whose body is there, as the parts that answer it see it."""

from __future__ import annotations

import dataclasses

from onnx_dl.server.http.head import Encoding, Head
from onnx_dl.server.http.targets import Target


@dataclasses.dataclass(slots=True)
class HttpRequest:
    """``body`` as it was sent.  ``began``: when its head was there, on the loop's clock."""

    head: Head
    target: Target
    body: memoryview
    encoding: Encoding
    header_length: int | None
    began: float
    is_given_up: bool = False
    """The client has gone: for threads that work on the request, and cannot be cancelled."""
