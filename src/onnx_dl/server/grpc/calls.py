"""One call of the protocol: what it needs, and how it is answered."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, Protocol, TypeVar

from onnx_dl.server.grpc.messages import Message
from onnx_dl.server.interfaces import Server
from onnx_dl.server.v2.operations import Operation

T = TypeVar("T")


class Wait(Protocol):
    """Runs a coroutine of the server's loop and waits for its end, in a handler's thread."""

    def __call__(self, coroutine: Coroutine[Any, Any, T], /) -> T: ...


class UnaryCall(NamedTuple):
    """A call with one message and one answer."""

    operation: Operation
    request: type[Message]
    answer: Callable[[Server, Message, Wait], Message]
    """Raises RequestFailure."""
