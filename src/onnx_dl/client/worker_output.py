"""What a private host's workers write on stderr, written by the application: as if onnxruntime ran in it.

It goes to descriptor 2 as that is when it is written, so that notebooks, pytest's capture and wrappers that
redirect it find it, or as records to the logger ``onnx_dl.worker``.  A thread of its own writes: a terminal
that was stopped, a pipe that nobody empties and a handler that waits block that thread, and nobody else.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import re
import signal
import traceback
from collections.abc import Iterator
from typing import Final, NamedTuple

from onnx_dl.concurrency import primitives
from onnx_dl.concurrency.forking import Promise
from onnx_dl.concurrency.threads import Thread
from onnx_dl.errors import OnnxDLError
from onnx_dl.system import backlog

logger = logging.getLogger("onnx_dl.worker")

_LONGEST: Final = 1 << 16
"""Bytes of a line that becomes one record."""
_PATIENCE: Final = 0.2
"""Seconds that a caller waits for what was written before its answer came."""
_IDLE: Final = 1.0
"""Seconds without a line after which the thread ends."""
_STDERR: Final = 2
_COLOUR: Final = re.compile(rb"\x1b\[[0-9;]*m")
_SEVERITY: Final = re.compile(rb"\[([VIWEF]):onnxruntime")
_LEVELS: Final = {
    b"V": logging.DEBUG,
    b"I": logging.INFO,
    b"W": logging.WARNING,
    b"E": logging.ERROR,
    b"F": logging.CRITICAL,
}


class Said(NamedTuple):
    """A piece of what one process has written.  ``worker_id`` 0: the supervisor.  ``last``: it has ended."""

    worker_id: int
    model: str
    pid: int
    text: bytes
    last: bool = False


class Record(NamedTuple):
    """One line, as the log has it."""

    level: int
    line: str
    said: Said


class Lines:
    """Puts pieces together to lines, for each process its own.  Pure."""

    def __init__(self) -> None:
        self._begun: dict[int, Said] = {}

    def add(self, said: Said) -> Iterator[Record]:
        """The lines that this piece ends.  Empty ones say nothing, and are none."""
        before = self._begun.pop(said.worker_id, None)
        *lines, rest = ((before.text if before else b"") + said.text).split(b"\n")
        if rest and (said.last or len(rest) > _LONGEST):
            lines, rest = [*lines, rest], b""
        if rest:
            self._begun[said.worker_id] = said._replace(text=rest)
        return (record for line in lines if (record := _record(line, said)).line)

    def end(self) -> Iterator[Record]:
        """What was never ended by a line break."""
        for said in list(self._begun.values()):
            yield from self.add(said._replace(text=b"", last=True))


def _record(line: bytes, said: Said) -> Record:
    """Without colours; the level is onnxruntime's severity, if the line has one."""
    plain = _COLOUR.sub(b"", line).rstrip(b"\r")
    match = _SEVERITY.search(plain)
    level = _LEVELS[match[1]] if match else logging.INFO if said.worker_id else logging.WARNING
    return Record(level, plain.decode(errors="backslashreplace"), said)


class WorkerLines:
    """Those of one supervisor.  Its connection's thread puts them here, and says when there will be no more.

    No lock: who puts something starts a thread unless there is one, and of several the one writes that has
    the token.  It looks once more after it has given that back, for what was put in between.
    """

    def __init__(self, *, log: bool = False) -> None:
        """``log``: to the logger, instead of descriptor 2."""
        self._log = log
        self._waiting: primitives.SimpleQueue[Said | Promise[None] | None] = primitives.SimpleQueue()
        self._token: collections.deque[None] = collections.deque([None])
        self._lines = Lines()
        self._writer: int | None = None
        """The number of the thread that writes."""
        # Each is written by one thread only: who puts, or who writes.
        self._put = self._dropped = 0
        self._done = self._told = 0
        self._stuck = False
        """Whether somebody has waited in vain since something was written."""

    def put(self, said: Said) -> None:
        """Written soon; does not wait.  In the connection's thread only."""
        if self._put - self._done + len(said.text) > backlog.MOST:
            self._dropped += len(said.text)
            said = said._replace(text=b"")
        if said.text or said.last:
            self._put += _size(said)
            self._give(said)

    def catch_up(self) -> None:
        """Returns when all that was put before is written, or soon: a caller goes on when what its load has
        written can be read, unless nobody reads."""
        if self._put == self._done or self._stuck or self._writer == primitives.get_ident():
            return
        mark: Promise[None] = Promise()
        self._give(mark)
        with contextlib.suppress(OnnxDLError):  # this is a forked child, without the thread
            try:
                mark.result(_PATIENCE)
            except TimeoutError:
                self._stuck = True

    def end(self) -> None:
        """Nothing more will be put; what waits is still written."""
        if self._put:
            self._put += _size(None)
            self._give(None)

    def _give(self, item: Said | Promise[None] | None) -> None:
        self._waiting.put(item)
        if self._token:
            with contextlib.suppress(RuntimeError):  # no thread to be had; the next piece tries again
                Thread(self._write_all, "onnx-dl-stderr").start()

    # --- the thread ---------------------------------------------------------------------------------------

    def _write_all(self) -> None:
        if not self._log:
            # Either would end or stop the application, which has written nothing.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE, signal.SIGTTOU})
        while not self._waiting.empty():
            try:
                self._token.pop()
            except IndexError:  # another thread writes
                return
            self._writer = primitives.get_ident()
            try:
                self._write_until_idle()
            finally:
                self._writer = None
                self._token.append(None)

    def _write_until_idle(self) -> None:
        with contextlib.suppress(primitives.Empty):
            while self._take(self._waiting.get(timeout=_IDLE)):
                pass

    def _take(self, item: Said | Promise[None] | None) -> bool:
        """Whether more may come."""
        if isinstance(item, Promise):
            item.set_result(None)
            return True
        if item is None:
            for record in self._lines.end():
                _tell(record)
        else:
            self._write(item)
        self._done += _size(item)
        self._stuck = False
        return item is not None

    def _write(self, said: Said) -> None:
        if missing := self._dropped - self._told:
            self._told += missing
            self._write(Said(0, "", os.getpid(), backlog.dropped(missing)))
        if not self._log:
            backlog.write(_STDERR, said.text)
            return
        for record in self._lines.add(said):
            _tell(record)


def _size(item: Said | None) -> int:
    """By how much it counts: its bytes, and itself."""
    return 1 if item is None else 1 + len(item.text)


def _tell(record: Record) -> None:
    said = record.said
    more = {"onnx_dl_model": said.model, "onnx_dl_pid": said.pid}
    try:
        logger.log(record.level, "%s", record.line, extra=more)
    except Exception:  # a handler's
        traceback.print_exc()
