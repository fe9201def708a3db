"""Calls that one caller makes again and again, as the worker remembers them.

The caller's side is :mod:`onnx_dl.tensors.call_plans`.  From the second time on, a call is prepared: the engine
reads its inputs where the caller puts them and writes its results where the caller finds them, and the reply
is ready before the run.  Nothing is packed, unpacked or looked up.

Where the engine cannot do that (text, maps, sequences), the call is run the plain way, without asking again
what was asked the first time, and its results are put where the last ones lay, if they are of the same form
(:mod:`onnx_dl.tensors.result_forms`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np

from onnx_dl.protocol import codec
from onnx_dl.protocol.lane import Again, Call, Forgotten, Items, Result, Tensor, Text, Value
from onnx_dl.tensors.arena import Block, align
from onnx_dl.tensors.call_plans import MOST, in_place
from onnx_dl.tensors.result_forms import Form, in_one_place
from onnx_dl.transport.worker_lane import WorkerLane
from onnx_dl.workers.cancellation import Halt
from onnx_dl.workers.engines.base import Backend, Rerun

_MOST: Final = 16
"""Preparations of one call: one for each set of blocks in which its large arrays take turns."""


class _Prepared(NamedTuple):
    run: Callable[[], object]
    halt: Callable[[], object] | None
    reply: bytes
    """Empty: Same."""


class Repeat:
    """One call.  Its arrays are views of the caller's memory."""

    def __init__(self, call: Call, outputs: Any, feed: dict[str, Any]) -> None:
        self.outputs = outputs
        self.keep = call.keep
        self.names = list(feed)
        self._moved = len(call.moved)
        moved = {self.names[index] for index in call.moved}
        self._texts = [(name, v) for name, v in call.feed if isinstance(v, Text) and v.block]
        self._readers: list[tuple[str, Callable[[], Any]]] = []
        """Of these, once the call has repeated."""
        absent = moved.union(name for name, _ in self._texts)
        self.feed = {name: None if name in absent else array for name, array in feed.items()}
        self.blocks = {
            value.block
            for name, value in call.feed
            if isinstance(value, Tensor | Text) and value.block and name not in moved
        }
        self._preparable = True
        self._results: list[Tensor] = []
        """Where they lay the last time; empty: it is not known where the next ones may lie."""
        self._scratch: Block | None = None
        self._nbytes = 0
        self._prepared: dict[tuple[int, ...], _Prepared | None] = {}
        self.form: Form | None = None
        """How the results lie that were sent last, if others can take their place."""
        self._plainly: Rerun | None = None

    def fed(self, lane: WorkerLane, moved: dict[str, Any]) -> dict[str, Any]:
        """The feed of the present call; ``moved``: what lies elsewhere each time."""
        if not self._texts:
            return self.feed | moved if moved else self.feed
        if not self._readers:
            self._readers = [(name, lane.text_reader(text)) for name, text in self._texts]
        feed = self.feed | moved
        for name, read in self._readers:
            feed[name] = read()
        return feed

    def let_go(self, has: Callable[[int], bool]) -> None:
        """The caller dropped blocks: what was prepared for one would keep its memory.  ``has``: whether one
        is left."""
        places = 2 * self._moved  # block and offset of each come first in a key
        if places:
            kept = self._prepared.items()
            self._prepared = {key: made for key, made in kept if all(map(has, key[:places:2]))}

    def forget(self) -> None:
        """Prepares anew: memory that was in use before may be gone."""
        self._results.clear()
        self._prepared.clear()
        self.form = None

    def leave(self, scratch: Block | None) -> None:
        """This is the scratch block now: another one, where results lay, would never be freed."""
        if self._scratch is not None and self._scratch is not scratch:
            self._scratch = None
            self.forget()

    def learn(self, sent: Value, lane: WorkerLane) -> None:
        """The results were sent like this: the next ones may lie where these do, or in blocks like theirs."""
        self.forget()
        if self._preparable and (tensors := in_place(sent)):
            self._nbytes = sum(align(_nbytes(t)) for t in tensors if not t.leased)
            # The one that holds them: to ask for one could replace it, and the caller reads where they lay.
            self._scratch = lane.current_scratch if self._nbytes else None
            self._results = tensors
        elif (block := lane.current_scratch) is not None and (values := in_one_place(sent)):
            self._scratch, self.form = block, Form(values, block)

    def run_plainly(self, backend: Backend, feed: dict[str, Any], halt: Halt) -> Any:
        """Runs the call as the engine does it by itself.

        Raises:
            Exception: the engine's.
        """
        if self._plainly is None:
            self._plainly = backend.rerun(self.outputs)
            return backend.run(self.outputs, feed, None, halt)
        plainly, self._plainly = self._plainly, None
        halt.attach(plainly.halt)
        try:
            results = plainly.run(feed)
        finally:
            halt.detach()
        if not halt.was_asked:  # else it would end the next one, too
            self._plainly = plainly
        return results

    def run(
        self, lane: WorkerLane, backend: Backend, feed: dict[str, Any], key: list[int], halt: Halt
    ) -> bool:
        """Runs the call as it was prepared, and replies.  False: run it the plain way.

        ``key`` says where those arrays of ``feed`` lie that lie elsewhere each time.
        """
        if not self._results or (self._nbytes and lane.scratch(self._nbytes) is not self._scratch):
            return False
        leased: list[Block] = []
        try:
            made = self._lease(lane, leased) and self._ran(leased, backend, feed, key, halt)
            if made:
                _say(lane, made.reply)
                return True
        except BaseException:  # a block that the caller never hears of would never be free
            _release(leased)
            raise
        _release(leased)
        return False

    def _ran(
        self, leased: list[Block], backend: Backend, feed: dict[str, Any], key: list[int], halt: Halt
    ) -> _Prepared | None:
        """What was run; None if it could not be like this."""
        try:
            prepared = self._prepare(leased, backend, feed, (*key, *(block.number for block in leased)))
            if prepared is not None:
                halt.attach(prepared.halt)
                try:
                    prepared.run()
                finally:
                    halt.detach()
                return prepared
        except Exception:  # the plain way shall tell, or find other shapes
            self._preparable = False
        self.forget()
        return None

    def _lease(self, lane: WorkerLane, leased: list[Block]) -> bool:
        """Takes a block for each large result; false if the reply cannot announce so many new ones."""
        for tensor in self._results:
            if tensor.leased:
                block = lane.lease(_nbytes(tensor))
                if block is None:
                    return False
                leased.append(block)
        return True

    def _prepare(
        self, leased: list[Block], backend: Backend, feed: dict[str, Any], key: tuple[int, ...]
    ) -> _Prepared | None:
        if key not in self._prepared:
            if len(self._prepared) >= _MOST:
                self._prepared.clear()
            self._prepared[key] = self._make(iter(leased), backend, feed)
        return self._prepared[key]

    def _make(self, leased: Any, backend: Backend, feed: dict[str, Any]) -> _Prepared | None:
        places: list[tuple[Tensor, Any]] = [
            (t, next(leased) if t.leased else self._scratch) for t in self._results
        ]
        arrays = [block.array(t.dtype, t.shape, 0 if t.leased else t.offset) for t, block in places]
        made = backend.repeat(self.outputs, feed, arrays)
        if made is None:
            self._preparable = False
            return None
        if not any(t.leased for t in self._results):
            return _Prepared(made.run, made.halt, b"")
        tensors: list[Value] = [
            Tensor(t.dtype, t.shape, block.number, 0, True) if t.leased else t for t, block in places
        ]
        return _Prepared(made.run, made.halt, codec.encode(Result(value=Items("list", tensors))))


class Repeats:
    """All that one caller repeats."""

    def __init__(self, lane: WorkerLane, backend: Backend, halt: Halt) -> None:
        self._lane = lane
        self._halt = halt
        self._backend = backend
        self._repeats: dict[int, Repeat] = {}
        self._drops = 0
        self._scratch: Block | None = None

    def remember(self, number: int, repeat: Repeat) -> None:
        """Keeps a call whose result is sent, instead of the one that had this number; of all, if it is 0.

        One of a number that no caller of ours gives is not kept: there is a bound to what is.
        """
        if not 0 <= number < MOST:
            return
        if not number:
            self._repeats.clear()
        self._repeats[number] = repeat

    def clear(self) -> None:
        """The caller has forgotten them too."""
        self._repeats.clear()

    def answer(self, again: Again) -> None:
        """Runs a remembered call whose large inputs lie elsewhere than the last time, and replies; Forgotten,
        if there is none of that number.

        Raises:
            Exception: the engine's.
        """
        repeat = self._find(again.plan)
        if repeat is None:
            self._lane.say(Forgotten())
            return
        moved = {repeat.names[i]: self._lane.unpack(tensor) for i, tensor in again.moved}
        key = [number for _, tensor in again.moved for number in (tensor.block, tensor.offset)]
        self._run(repeat, repeat.fed(self._lane, moved), key)

    def answer_number(self, number: int) -> None:
        """Like :meth:`answer`, with nothing moved."""
        repeat = self._find(number)
        if repeat is None:
            self._lane.say(Forgotten())
            return
        self._run(repeat, repeat.fed(self._lane, {}), [])

    def _find(self, number: int) -> Repeat | None:
        self.review()
        return self._repeats.get(number)

    def _run(self, repeat: Repeat, feed: dict[str, Any], key: list[int]) -> None:
        if not repeat.run(self._lane, self._backend, feed, key, self._halt):
            self._run_plainly(repeat, feed)

    def _run_plainly(self, repeat: Repeat, feed: dict[str, Any]) -> None:
        results = repeat.run_plainly(self._backend, feed, self._halt)
        if repeat.form is not None and self._lane.put(repeat.form, results):
            self._lane.say_same()
            return
        sent = self._lane.reply(results, keep=repeat.keep)
        if self._scratch is not (scratch := self._lane.current_scratch):
            self._scratch = scratch
            for other in self._repeats.values():
                other.leave(scratch)
        repeat.learn(sent, self._lane)

    def review(self) -> None:
        """Lets go what lies in blocks that the caller dropped: it would never be freed."""
        if self._drops != self._lane.drops:
            self._let_go()

    def _let_go(self) -> None:
        self._drops = self._lane.drops
        self._repeats = {n: r for n, r in self._repeats.items() if all(map(self._lane.has, r.blocks))}
        for repeat in self._repeats.values():
            repeat.let_go(self._lane.has)


def _say(lane: WorkerLane, reply: bytes) -> None:
    if reply:
        lane.say(reply)
    else:
        lane.say_same()


def _release(blocks: list[Block]) -> None:
    for block in blocks:
        block.end_lease()


def _nbytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
