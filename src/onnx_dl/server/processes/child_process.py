"""One child of a server as the first process sees it: its process, its link, and what it was last known to
have counted."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

import msgspec

from onnx_dl.server.interfaces import VersionStatistics
from onnx_dl.server.processes import messages as m
from onnx_dl.server.processes.link import Link, Tickets
from onnx_dl.server.repository.waits import wait_in_thread
from onnx_dl.server.v2.failures import RequestFailure, internal
from onnx_dl.system import boot

ANSWER_TIMEOUT: Final = 10.0
"""Seconds that a child has to take over what it is told; then it is killed, and another one started."""
_COUNTS_TIMEOUT: Final = 3.0
"""Seconds that a page of metrics waits for a child's counts; then those that it sent last are shown.  A
machine may stand still for a second or two, and a scraper waits for ten."""

_log: Final = logging.getLogger("onnx_dl.server")
_Told = TypeVar("_Told", bound=msgspec.Struct)
Answering = Callable[[m.Ask], Awaitable[m.Done]]
"""Carries out what a child asks for.  Raises RequestFailure."""


class ChildGone(Exception):
    """The child has ended, or was killed because it did not answer.

    It serves nobody any more, so that whoever waits for it need not."""


class ChildProcess:
    """A child.  All methods belong to the loop's thread, which must be the main thread: the child dies with
    the thread that has started it."""

    def __init__(self, row: int, answer: Answering, ended: Callable[[ChildProcess], None]) -> None:
        """Starts the process.  ``row``: its row in the page of limits; ``ended``: is called once, when it has
        ended or was killed.

        Raises:
            OSError: the system has no more processes or descriptors.
        """
        self.row = row
        self._began = time.monotonic()
        self.statistics: list[VersionStatistics] = []
        """Counts that it sent last."""
        self._answer = answer
        self._ended = ended
        self._tickets = Tickets()
        self._tasks: set[asyncio.Task[None]] = set()
        self.listens: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.listens.add_done_callback(lambda future: future.cancelled() or future.exception())
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                launch = boot.launch("front", theirs.fileno(), os.getpid())
                self._process = subprocess.Popen(
                    launch.argv, env=launch.environment, stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()], process_group=0,
                )  # fmt: skip
        except BaseException:
            ours.close()
            raise
        self._link = Link(ours, msgspec.msgpack.Decoder(m.ToOwner), self._on_message, self._on_lost)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_listening(self) -> bool:
        return self.listens.done() and self.listens.exception() is None

    @property
    def age(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self._began

    def tell(self, message: msgspec.Struct, fds: Sequence[int] = ()) -> None:
        """Sends a message that has no answer, or whose answer is not waited for here."""
        self._link.send(message, fds)

    async def told(self, make: Callable[[int], _Told], fds: Sequence[int] = ()) -> object:
        """Sends a message and returns the answer to it.  A child that listens and does not answer in time is
        killed.

        Raises:
            ChildGone: it has ended, or was killed.
        """
        ticket, future = self._tickets.open()
        try:
            self._link.send(make(ticket), fds)
            if not self._link.is_open:
                raise ChildGone
            async with asyncio.timeout(ANSWER_TIMEOUT):
                return await future
        except TimeoutError:
            if self.is_listening:  # else it serves nobody yet, and takes over all before it does
                self.kill()
            raise ChildGone from None
        finally:
            future.cancel()

    async def count(self) -> None:
        """Asks for its counts, and returns when they are there, or if it is slow: they may come later."""
        asked = asyncio.ensure_future(self.told(lambda ticket: m.AskCounts(ticket=ticket)))
        asked.add_done_callback(self._note)
        await asyncio.wait([asked], timeout=_COUNTS_TIMEOUT)

    def _note(self, asked: asyncio.Future[object]) -> None:
        answer = None if asked.cancelled() or asked.exception() is not None else asked.result()
        if isinstance(answer, m.Counts):
            self.statistics = answer.statistics

    def kill(self) -> None:
        """Ends it at once."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        self._link.close()
        self._on_lost()

    async def ended(self, seconds: float) -> None:
        """Returns when it has ended by itself; kills it after so many seconds."""
        waiting = asyncio.ensure_future(wait_in_thread(self._process.wait, seconds))
        await asyncio.wait([waiting])
        if waiting.exception() is not None:
            self.kill()
            await wait_in_thread(self._process.wait)

    def _on_message(self, message: m.ToOwner, fds: list[int]) -> None:
        for fd in fds:  # none is expected
            os.close(fd)
        match message:
            case m.Taken() | m.Counts():
                self._tickets.answer(message.ticket, message)
            case m.Listening():
                if not self.listens.done():
                    self.listens.set_result(None)
            case m.Failed():
                if not self.listens.done():
                    self.listens.set_exception(ChildGone(message.text))
            case m.Ask():
                task = asyncio.get_running_loop().create_task(self._serve(message))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _serve(self, question: m.Ask) -> None:
        try:
            self._link.send(await self._answer(question))
        except RequestFailure as failure:
            self._link.send(m.refusal(question.ticket, failure))
        except Exception:  # without an answer, the child's client would wait for its deadline
            _log.exception("%s, asked for by a process of the server, failed", question.operation)
            self._link.send(m.refusal(question.ticket, internal("The first process of the server failed.")))

    def _on_lost(self) -> None:
        if not self.listens.done():
            self.listens.set_exception(ChildGone("The process ended before it listened."))
        self._tickets.fail(ChildGone())
        ended, self._ended = self._ended, functools.partial(_nothing)
        ended(self)


def _nothing(_: object) -> None:
    pass
