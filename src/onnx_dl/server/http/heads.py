"""The heads of one connection, and what was decided about them."""

from __future__ import annotations

from typing import Final

from onnx_dl.server.http.handler import Admitted, Handler
from onnx_dl.server.http.head import Head, parse_head
from onnx_dl.server.interfaces import Caller

_REPEATED_BYTES: Final = 1024
"""Bytes of a head that is kept, because the next one may be the same."""


class Heads:
    """Decides about heads."""

    def __init__(self, handler: Handler, caller: Caller) -> None:
        """``caller``: the client, without what its requests say."""
        self._handler = handler
        self._caller = caller
        self.last: Head | None = None
        """The head of the request that is read or answered; None: it was none."""
        self._repeated: tuple[bytes, Admitted] | None = None
        """The last head of an inference, as it was sent."""

    def admit(self, raw: bytes) -> Admitted:
        """Decide about a head.  One that repeats is not parsed again: clients send the same for each call.

        Raises:
            RequestFailure: it is refused, or is no head.
            NotAllowed: its path has other methods.
        """
        if self._repeated is not None and raw == self._repeated[0]:
            admitted = self._repeated[1]
            self.last = admitted.head
            self._handler.admit_again(admitted, self._caller)
            return admitted
        self.last = None
        self.last = head = parse_head(raw)
        admitted = self._handler.admit(head, self._caller)
        if admitted.is_inference and len(raw) <= _REPEATED_BYTES:
            self._repeated = raw, admitted
        return admitted
