"""Messages between the first process of a server (the owner) and the others (its children).

Each is one msgpack map with its name in ``type``.  Questions have a ticket, which the answer repeats.
``docs/protocol.md`` lists them.
"""

from __future__ import annotations

from typing import Any

import msgspec

from onnx_dl.server.interfaces import ModelState, RegionStatus, ServedTable, VersionStatistics
from onnx_dl.server.options import ServeOptions
from onnx_dl.server.v2.failures import Reason, RequestFailure


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag=True):
    """Base of all messages."""


# --- owner → child -----------------------------------------------------------------------------------------


class Begin(_Message, frozen=True, kw_only=True, tag=True):
    """The first message to a child, with the descriptor of the page of limits.  Answered by Listening."""

    options: ServeOptions
    host: str
    row: int
    table: ServedTable


class UseTable(_Message, frozen=True, kw_only=True, tag=True):
    """Serve this table from now on.  Answered by Taken."""

    ticket: int
    table: ServedTable


class UseRegion(_Message, frozen=True, kw_only=True, tag=True):
    """A region was registered; comes with its descriptor.  Answered by Taken."""

    ticket: int
    region: RegionStatus


class DropRegions(_Message, frozen=True, kw_only=True, tag=True):
    """A region was unregistered; None: all.  Answered by Taken."""

    ticket: int
    name: str | None


class AskCounts(_Message, frozen=True, kw_only=True, tag=True):
    """Asks for the statistics of this process, and whether it is alive.  Answered by Counts."""

    ticket: int


class Done(_Message, frozen=True, kw_only=True, tag=True):
    """Answers Ask.  ``result`` is None, or the data that the operation returns."""

    ticket: int
    regions: list[RegionStatus] = []
    statistics: list[VersionStatistics] = []
    state: ModelState | None = None
    text: bytes = b""
    kind: str = ""


class Refusal(_Message, frozen=True, kw_only=True, tag=True):
    """Answers Ask: the operation raised a RequestFailure, whose fields these are."""

    ticket: int
    http: int
    grpc: str
    text: str
    retry_after: float | None
    reason: Reason


class Drain(_Message, frozen=True, kw_only=True, tag=True):
    """Take no new requests, finish those that run within ``seconds``, and end.  Answered by its end."""

    seconds: float


# --- child → owner -----------------------------------------------------------------------------------------


class Listening(_Message, frozen=True, kw_only=True, tag=True):
    """Answers Begin: the child takes requests at both addresses."""


class Failed(_Message, frozen=True, kw_only=True, tag=True):
    """Answers Begin: the child cannot serve, and ends."""

    text: str


class Taken(_Message, frozen=True, kw_only=True, tag=True):
    """Answers UseTable, UseRegion and DropRegions: the next request here sees it."""

    ticket: int


class Counts(_Message, frozen=True, kw_only=True, tag=True):
    """Answers AskCounts."""

    ticket: int
    statistics: list[VersionStatistics]


class Ask(_Message, frozen=True, kw_only=True, tag=True):
    """One call of a method of ``interfaces.Control``, by name.  Answered by Done or Refusal."""

    ticket: int
    operation: str
    arguments: list[Any] = []


ToChild = Begin | UseTable | UseRegion | DropRegions | AskCounts | Done | Refusal | Drain
ToOwner = Listening | Failed | Taken | Counts | Ask


def refusal(ticket: int, failure: RequestFailure) -> Refusal:
    """The message of a failure."""
    return Refusal(
        ticket=ticket,
        http=failure.http,
        grpc=failure.grpc,
        text=str(failure),
        retry_after=failure.retry_after,
        reason=failure.reason,
    )


def failure_of(message: Refusal) -> RequestFailure:
    """The failure of a message."""
    return RequestFailure(
        message.http, message.grpc, message.text, retry_after=message.retry_after, reason=message.reason
    )
