"""Requests of clients that are not answered yet, and the commands decided so far."""

from __future__ import annotations

from collections.abc import Iterable

from onnx_dl.protocol import codec, control, failures
from onnx_dl.supervisor.policy.commands import Command, SendToClient, SendToWorker
from onnx_dl.supervisor.policy.records import HOST

Reply = control.Granted | control.Denied | control.Unloaded | control.Outcome | control.Bye


class Tickets:
    """Open requests by client and ticket.  Each is answered once, or withdrawn by its client."""

    def __init__(self) -> None:
        self._open: set[tuple[bytes, int]] = set()

    def opened(self, client: bytes, ticket: int) -> None:
        """Adds a request."""
        self._open.add((client, ticket))

    def close(self, client: bytes, ticket: int) -> bool:
        """Removes a request that is answered or withdrawn.  False if it was not open."""
        try:
            self._open.remove((client, ticket))
        except KeyError:
            return False
        return True

    def is_open(self, client: bytes, ticket: int) -> bool:
        """Whether the request waits for an answer."""
        return (client, ticket) in self._open

    def client_gone(self, client: bytes) -> None:
        """Removes all requests of a client."""
        self._open = {(who, ticket) for who, ticket in self._open if who != client}

    def __len__(self) -> int:
        return len(self._open)


class Outbox:
    """Commands in the order in which they were decided, until the loop takes them.

    If a fact fails half way, what was decided before stays here, and goes out with the next fact.
    """

    def __init__(self, tickets: Tickets) -> None:
        self.tickets = tickets
        self._commands: list[Command] = []

    def add(self, *commands: Command) -> None:
        self._commands += commands

    def extend(self, commands: Iterable[Command]) -> None:
        """Adds commands one by one, so that those before an exception are kept."""
        for command in commands:
            self._commands.append(command)

    def take(self) -> list[Command]:
        """Removes and returns all commands."""
        commands, self._commands = self._commands, []
        return commands

    def order(self, worker_id: int, message: codec.Message) -> None:
        """Sends a message to a worker."""
        self.add(SendToWorker(worker_id, message))

    def answer(self, client: bytes, reply: Reply) -> None:
        """Answers a request, unless it was withdrawn.  The host's own requests have no ticket."""
        if client == HOST or self.tickets.close(client, reply.ticket):
            self.add(SendToClient(client, reply))

    def deny(self, client: bytes, ticket: int, failure: failures.Failure) -> None:
        """Answers an Acquire by a failure."""
        self.answer(client, control.Denied(ticket=ticket, failure=failure))
