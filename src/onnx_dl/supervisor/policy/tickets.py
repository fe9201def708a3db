"""Which requests of clients are not answered yet.  Pure.

Each is answered exactly once, or withdrawn by whoever asked.  What the answers are, the scheduler says.
"""

from __future__ import annotations


class Tickets:
    """By client and ticket."""

    def __init__(self) -> None:
        self._open: set[tuple[bytes, int]] = set()

    def opened(self, client: bytes, ticket: int) -> None:
        """A client asks."""
        self._open.add((client, ticket))

    def close(self, client: bytes, ticket: int) -> bool:
        """The request is answered or withdrawn; whether it still waited for an answer."""
        try:
            self._open.remove((client, ticket))
        except KeyError:
            return False
        return True

    def is_open(self, client: bytes, ticket: int) -> bool:
        """Whether somebody waits for the answer."""
        return (client, ticket) in self._open

    def client_gone(self, client: bytes) -> None:
        """Nobody hears the answers."""
        self._open = {(who, ticket) for who, ticket in self._open if who != client}

    def __len__(self) -> int:
        return len(self._open)
