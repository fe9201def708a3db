"""Writes the stderr of a private host's workers, as if onnxruntime ran in the application.

It goes to the present descriptor 2, where notebooks, pytest's capture and wrappers that redirect it find it,
or as records to the logger ``onnx_dl.worker``.  A thread of its own writes: a stopped terminal, a full pipe
or a handler that waits blocks that thread and nothing else.
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

import msgspec

from onnx_dl.concurrency import primitives
from onnx_dl.concurrency.forking import Promise
from onnx_dl.concurrency.spawning import Thread
from onnx_dl.errors import OnnxDLError
from onnx_dl.protocol.control import Wrote
from onnx_dl.system import small_files

logger = logging.getLogger("onnx_dl.worker")

_LONGEST: Final = 1 << 16
"""Bytes of a line that becomes one record."""
_PATIENCE: Final = 0.2
"""Seconds that a caller waits for the text that came before its answer."""
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


class LogLine(NamedTuple):
    """One line for the log."""

    level: int
    line: str
    piece: Wrote


class LineAssembler:
    """Assembles pieces to lines, separately for each process.  Pure."""

    def __init__(self) -> None:
        self._begun: dict[int, Wrote] = {}

    def add(self, piece: Wrote) -> Iterator[LogLine]:
        """The lines that this piece ends, without empty ones."""
        before = self._begun.pop(piece.worker_id, None)
        *lines, rest = ((before.text if before else b"") + piece.text).split(b"\n")
        if rest and (piece.last or len(rest) > _LONGEST):
            lines, rest = [*lines, rest], b""
        if rest:
            self._begun[piece.worker_id] = msgspec.structs.replace(piece, text=rest)
        return (record for line in lines if (record := _record(line, piece)).line)

    def end(self) -> Iterator[LogLine]:
        """The lines that no line break has ended."""
        for piece in list(self._begun.values()):
            yield from self.add(msgspec.structs.replace(piece, text=b"", last=True))


def _record(line: bytes, piece: Wrote) -> LogLine:
    """Removes colours; the level is onnxruntime's severity, if the line has one."""
    plain = _COLOUR.sub(b"", line).rstrip(b"\r")
    match = _SEVERITY.search(plain)
    level = _LEVELS[match[1]] if match else logging.INFO if piece.worker_id else logging.WARNING
    return LogLine(level, plain.decode(errors="backslashreplace"), piece)


class WorkerOutput:
    """Queue of the pieces from one supervisor, filled by its connection's thread, and the thread that writes.

    No lock: :meth:`put` starts a thread if the token is free, and of several threads the one with the token
    writes.  It looks once more after it has put the token back, for pieces that came in between.
    """

    def __init__(self, *, log: bool = False) -> None:
        """``log``: to the logger, instead of descriptor 2."""
        self._log = log
        self._waiting: primitives.SimpleQueue[Wrote | Promise[None] | None] = primitives.SimpleQueue()
        self._token: collections.deque[None] = collections.deque([None])
        self._lines = LineAssembler()
        self._writer: int | None = None
        """The number of the thread that writes."""
        # Sizes.  The connection's thread changes the first two, the writer the others.
        self._put = self._dropped = 0
        self._written = self._reported = 0
        self._stuck = False
        """True if a caller has waited in vain since the last write."""

    def put(self, piece: Wrote) -> None:
        """Queues a piece; does not wait.  In the connection's thread only."""
        if self._put - self._written + len(piece.text) > small_files.MOST_UNWRITTEN:
            self._dropped += len(piece.text)
            piece = msgspec.structs.replace(piece, text=b"")
        if piece.text or piece.last:
            self._put += _size(piece)
            self._enqueue(piece)

    def catch_up(self) -> None:
        """Waits until all that was put before is written, but not for long.  So the output of a load can be
        read when its caller goes on, unless nobody reads."""
        if self._put == self._written or self._stuck or self._writer == primitives.get_ident():
            return
        mark: Promise[None] = Promise()
        self._enqueue(mark)
        with contextlib.suppress(OnnxDLError):  # this is a forked child, without the thread
            try:
                mark.result(_PATIENCE)
            except TimeoutError:
                self._stuck = True

    def end(self) -> None:
        """Ends the writing after what was put before."""
        if self._put:
            self._put += _size(None)
            self._enqueue(None)

    def _enqueue(self, item: Wrote | Promise[None] | None) -> None:
        self._waiting.put(item)
        if self._token:
            with contextlib.suppress(RuntimeError):  # there is no thread; the next piece tries again
                Thread(self._write_all, "onnx-dl-stderr").start()

    def _write_all(self) -> None:
        if not self._log:
            # Either would end or stop the application for what it has not written itself.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE, signal.SIGTTOU})
        while not self._waiting.empty():
            try:
                self._token.pop()
            except IndexError:  # another thread writes
                return
            self._writer = primitives.get_ident()
            try:
                with contextlib.suppress(primitives.Empty):
                    while self._take(self._waiting.get(timeout=_IDLE)):
                        pass
            finally:
                self._writer = None
                self._token.append(None)

    def _take(self, item: Wrote | Promise[None] | None) -> bool:
        """Handles one item; whether more may come."""
        if isinstance(item, Promise):
            item.set_result(None)
            return True
        if item is None:
            for record in self._lines.end():
                _log(record)
        else:
            self._write(item)
        self._written += _size(item)
        self._stuck = False
        return item is not None

    def _write(self, piece: Wrote) -> None:
        if missing := self._dropped - self._reported:
            self._reported += missing
            self._write(Wrote(pid=os.getpid(), text=small_files.dropped(missing)))
        if not self._log:
            small_files.write(_STDERR, piece.text)
            return
        for record in self._lines.add(piece):
            _log(record)


def _size(item: Wrote | None) -> int:
    """Size of an item in the queue: its bytes and one."""
    return 1 if item is None else 1 + len(item.text)


def _log(record: LogLine) -> None:
    more = {"onnx_dl_model": record.piece.model, "onnx_dl_pid": record.piece.pid}
    try:
        logger.log(record.level, "%s", record.line, extra=more)
    except Exception:  # a handler's
        traceback.print_exc()
