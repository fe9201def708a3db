"""A further process of a server: takes requests at the same addresses, and asks the first one for control."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from typing import Any

import msgspec

from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.errors import OnnxDLError
from onnx_dl.protocol.failures import keep_engine_out
from onnx_dl.server.auth import access
from onnx_dl.server.inference.limits import Limits
from onnx_dl.server.processes import host, logs
from onnx_dl.server.processes import messages as m
from onnx_dl.server.processes.front import Addresses, Front, Listeners, background, keep_host
from onnx_dl.server.processes.link import Link
from onnx_dl.server.processes.loops import run
from onnx_dl.server.processes.remote_control import RemoteControl
from onnx_dl.server.v2.failures import RequestFailure
from onnx_dl.system import process_setup
from onnx_dl.system.process_title import set_title


def main(fd: int, parent: int) -> None:
    """Takes requests until the first process says that it drains, or is gone.

    ``fd``: the socket to the first process, whose process id is ``parent``.
    """
    process_setup.set_up_process()
    process_setup.die_with_parent(parent)
    logs.begin(is_first=False)
    keep_engine_out()
    # The terminal sends Ctrl-C to all: the first process decides when to end.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    set_title("process of a server")
    sys.exit(run(_Child(socket.socket(fileno=fd)).serve()))


class _Child:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._link: Link[m.ToChild]
        self._front: Front | None = None
        self._control: RemoteControl
        self._listeners = Listeners()
        self._begun: asyncio.Future[tuple[m.Begin, int]]
        self._ending: asyncio.Future[float | None]
        self._early: list[tuple[m.ToChild, list[int]]] = []
        """Messages from before this process was put together."""

    async def serve(self) -> int:
        """Returns the exit code."""
        loop = asyncio.get_running_loop()
        self._begun, self._ending = loop.create_future(), loop.create_future()
        self._link = Link(self._sock, msgspec.msgpack.Decoder(m.ToChild), self._receive, self._on_lost)
        self._control = RemoteControl(self._link)
        either: list[asyncio.Future[Any]] = [self._begun, self._ending]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self._ending.done():
            return 1
        order, page = self._begun.result()
        try:
            front = await self._put_together(order, page)
        except (OnnxDLError, access.AccessError, OSError) as error:
            self._link.send(m.Failed(text=str(error)))
            return 1
        with background(loop.create_task(keep_host(front.host))):
            self._link.send(m.Listening())
            seconds = await self._ending
            if seconds is None:  # the first process is gone
                return 1
            front.is_draining = True
            await self._listeners.drain(Deadline(seconds))
        await self._listeners.close()
        front.close()
        await asyncio.to_thread(front.host.close)
        return 0

    async def _put_together(self, order: m.Begin, page: int) -> Front:
        options = order.options
        limits = Limits(
            options.max_in_flight, options.max_queue_size, fd=page, row=order.row, rows=options.processes
        )
        os.close(page)
        own = host.host_of(options, order.host)
        await asyncio.to_thread(own.start)
        front = Front(options, own, limits, access.open_access(options, logs.tell))
        front.control = self._control
        front.table.apply(order.table)
        self._front = front
        for message, fds in self._early:
            self._take(front, message, fds)
        wanted = Addresses(options.http, options.grpc)
        await self._listeners.start(front, wanted, reuse_port=True)
        return front

    def _receive(self, message: m.ToChild, fds: list[int]) -> None:
        match message:
            case m.Begin():
                self._begun.set_result((message, fds[0]))
            case m.Done() | m.Refusal():
                self._control.on_answer(message)
            case m.Drain():
                self._end(message.seconds)
            case _ if self._front is None:
                self._early.append((message, fds))
            case _:
                self._take(self._front, message, fds)

    def _take(self, front: Front, message: m.ToChild, fds: list[int]) -> None:
        match message:
            case m.UseTable():
                front.table.apply(message.table)
                self._link.send(m.Taken(ticket=message.ticket))
            case m.UseRegion():
                try:
                    front.regions.adopt(message.region, fds[0])
                except (OnnxDLError, RequestFailure, OSError) as error:
                    # Its maker has truncated it since: no process can use it.
                    logs.tell(f"region {message.region.name!r} is not used here: {error}")
                self._link.send(m.Taken(ticket=message.ticket))
            case m.DropRegions():
                front.regions.unregister(message.name)
                self._link.send(m.Taken(ticket=message.ticket))
            case m.AskCounts():
                counts = front.statistics.snapshot()
                self._link.send(m.Counts(ticket=message.ticket, statistics=counts))

    def _on_lost(self) -> None:
        self._end(None)

    def _end(self, seconds: float | None) -> None:
        if not self._ending.done():
            self._ending.set_result(seconds)
