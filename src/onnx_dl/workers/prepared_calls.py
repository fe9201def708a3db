"""Calls that one caller repeats, on the worker's side; :mod:`onnx_dl.tensors.call_plans` is the caller's.

From the second time on, a call is prepared: the engine reads its inputs where the caller puts them and writes
its results where the caller finds them; nothing is packed or unpacked, and the reply is encoded before.

If the engine cannot do that (text, maps, sequences), the call runs unbound: its names are not decoded again,
and results of the same form (:mod:`onnx_dl.tensors.result_forms`) are written where the last ones lay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from onnx_dl.protocol import codec
from onnx_dl.protocol.lane import Call, Forgotten, Items, Replay, Result, Tensor, Text, Value
from onnx_dl.tensors.block import Block, align
from onnx_dl.tensors.call_plans import MOST, in_place
from onnx_dl.tensors.result_forms import ResultForm, in_one_place
from onnx_dl.transport.worker_lane import WorkerLane
from onnx_dl.workers.engines.base import Backend, CancelToken, Feed, Rerun
from onnx_dl.workers.pinned_blocks import LanePins

_MOST_RUNS: Final = 16
"""Prepared runs of one call: one for each set of blocks that its large arrays use in turn."""


class _PreparedRun(NamedTuple):
    run: Callable[[], object]
    cancel: Callable[[], object] | None
    reply: bytes
    """Empty: the reply is SameResult."""


class _DirectRun(NamedTuple):
    """A run whose results all lie in the scratch block, at less than ``nbytes``.  Its reply is SameResult."""

    run: Callable[[], object]
    cancel: Callable[[], object] | None
    nbytes: int
    scratch: Block


class PreparedCall:
    """One call that repeats.  Its arrays are views of the caller's memory."""

    def __init__(self, call: Call, outputs: object, feed: Feed) -> None:
        self.outputs = outputs
        self.keep = call.keep
        self.names = list(feed)
        self._moved = len(call.moved)
        moved = {self.names[index] for index in call.moved}
        self._texts = [(name, v) for name, v in call.feed if isinstance(v, Text) and v.block]
        self._readers: list[tuple[str, Callable[[], object]]] = []
        """Read these texts; made at the first repetition."""
        absent = moved.union(name for name, _ in self._texts)
        self._feed: Feed = {name: None if name in absent else array for name, array in feed.items()}
        self.blocks = {
            value.block
            for name, value in call.feed
            if isinstance(value, Tensor | Text) and value.block and name not in moved
        }
        self._can_bind = True
        self._results: list[Tensor] = []
        """Places of the last results; empty: places for the next ones are not known."""
        self._scratch: Block | None = None
        self._nbytes = 0
        self._runs: dict[tuple[int, ...], _PreparedRun | None] = {}
        self.direct: _DirectRun | None = None
        """The run with all inputs and results in their places, if the call has no other."""
        self.form: ResultForm | None = None
        """Places of the results that were sent last, if others can take them."""
        self._rerun: Rerun | None = None
        self.pins: LanePins | None = None

    def feed_with(self, lane: WorkerLane, moved: Feed) -> Feed:
        """Returns the feed of the present call; ``moved``: inputs that lie in another place at each call."""
        if not self._texts:
            return self._feed | moved if moved else self._feed
        if not self._readers:
            self._readers = [(name, lane.text_reader(text)) for name, text in self._texts]
        feed = self._feed | moved
        for name, read in self._readers:
            feed[name] = read()
        return feed

    def drop_unmapped(self, is_mapped: Callable[[int], bool]) -> None:
        """Drops the runs prepared for blocks that the caller dropped: they would keep the memory mapped."""
        places = 2 * self._moved  # a key begins with block and offset of each moved input
        if places:
            runs = self._runs.items()
            self._runs = {key: run for key, run in runs if all(map(is_mapped, key[:places:2]))}

    def reset(self) -> None:
        """Forgets all places, because memory that was in use before may be gone."""
        self._results.clear()
        self._runs.clear()
        self.form = self.direct = None

    def cannot_bind(self) -> None:
        """Has the call run unbound from now on."""
        self._can_bind = False
        self.reset()

    def on_scratch(self, scratch: Block | None) -> None:
        """Forgets places in any other scratch block than the lane's present one: it would never be freed."""
        if self._scratch is not None and self._scratch is not scratch:
            self._scratch = None
            self.reset()

    def learn(self, sent: Value, lane: WorkerLane) -> None:
        """Learns from sent results where the next ones may lie: in the same places, or leased like them."""
        self.reset()
        if self._can_bind and (tensors := in_place(sent)):
            self._nbytes = sum(align(_nbytes(t)) for t in tensors if not t.held)
            # Not lane.arena.scratch(): it may replace the block, and the caller reads the one that was sent.
            self._scratch = lane.arena.current_scratch if self._nbytes else None
            self._results = tensors
        elif (block := lane.arena.current_scratch) is not None and (values := in_one_place(sent)):
            self._scratch, self.form = block, ResultForm(values, block)

    def run_unbound(self, backend: Backend, feed: Feed, token: CancelToken) -> Sequence[object]:
        """Runs the call with results in the engine's own memory.

        Raises:
            Exception: the engine's.
        """
        if self._rerun is None:
            self._rerun = backend.rerun(self.outputs)
            return backend.run(self.outputs, feed, None, token)
        rerun, self._rerun = self._rerun, None
        token.attach(rerun.cancel)
        try:
            results = rerun.run(feed)
        finally:
            token.detach()
        if not token.is_cancelled:  # a cancelled one would end the next call, too
            self._rerun = rerun
        return results

    def run(self, lane: WorkerLane, backend: Backend, feed: Feed, key: list[int], token: CancelToken) -> bool:
        """Makes the prepared call and replies.  Returns false if it has to run unbound.

        ``key``: block and offset of each moved input.
        """
        if not self._results or (self._nbytes and lane.arena.scratch(self._nbytes) is not self._scratch):
            return False
        leased: list[Block] = []
        is_sent = False
        try:
            made = self._lease(lane, leased) and self._run_prepared(leased, backend, feed, key, token)
            if made:
                if made.reply:
                    lane.send(made.reply)
                else:
                    lane.send_same()
                is_sent = True
                if self.pins is not None:  # after the reply: its first time takes a while
                    self.pins.used({*self.blocks, *key[::2]}, [*leased, self._scratch])
        finally:
            if not is_sent:  # the caller never learns of these blocks, so nobody else would free them
                for block in leased:
                    block.release()
        return is_sent

    def _run_prepared(
        self, leased: list[Block], backend: Backend, feed: Feed, key: list[int], token: CancelToken
    ) -> _PreparedRun | None:
        """Returns the run that was made; None if it cannot be made in this way."""
        try:
            places = (*key, *(block.number for block in leased))
            if places not in self._runs:
                if len(self._runs) >= _MOST_RUNS:
                    self._runs.clear()
                self._runs[places] = self._bind(iter(leased), backend, feed)
            prepared = self._runs[places]
            if prepared is not None:
                token.attach(prepared.cancel)
                try:
                    prepared.run()
                finally:
                    token.detach()
                if self._scratch is not None and not (places or self._texts or prepared.reply):
                    self.direct = _DirectRun(prepared.run, prepared.cancel, self._nbytes, self._scratch)
                return prepared
        except Exception:  # the unbound run raises the error, or finds results of other shapes
            self._can_bind = False
        self.reset()
        return None

    def _lease(self, lane: WorkerLane, leased: list[Block]) -> bool:
        """Takes a block for each large result; false if one reply cannot announce so many new ones."""
        for tensor in self._results:
            if tensor.held:
                block = lane.arena.take(_nbytes(tensor))
                if block is None:
                    return False
                leased.append(block)
        return True

    def _bind(self, leased: Iterator[Block], backend: Backend, feed: Feed) -> _PreparedRun | None:
        places = [(t, next(leased) if t.held else self._scratch) for t in self._results]
        arrays = [
            block.array(t.dtype, t.shape, 0 if t.held else t.offset)
            for t, block in places
            if block is not None
        ]
        bound = backend.bind(self.outputs, feed, arrays)
        if bound is None:
            self._can_bind = False
            return None
        if not any(t.held for t in self._results):
            return _PreparedRun(bound.run, bound.cancel, b"")
        tensors: list[Value] = [
            Tensor(t.dtype, t.shape, block.number, 0, True) if t.held and block is not None else t
            for t, block in places
        ]
        return _PreparedRun(bound.run, bound.cancel, codec.encode(Result(value=Items("list", tensors))))


class PreparedCalls:
    """The calls that one caller repeats, by number."""

    def __init__(
        self,
        lane: WorkerLane,
        backend: Backend,
        token: CancelToken,
        pins: LanePins | None = None,
    ) -> None:
        """``pins``: None: the session uses no GPU."""
        self._lane = lane
        self._pins = pins
        self._token = token
        self._backend = backend
        self._calls: dict[int, PreparedCall] = {}
        self._drops = 0
        self._scratch: Block | None = None

    def remember(self, number: int, call: PreparedCall) -> None:
        """Keeps a call whose result is sent, in place of the one with this number; 0 replaces all.

        A number that no caller of ours gives is ignored, so that the number of calls is bounded.
        """
        if not 0 <= number < MOST:
            return
        if not number:
            self._calls.clear()
        self._calls[number] = call
        call.pins = self._pins

    def clear(self) -> None:
        """Forgets all calls, as the caller did."""
        self._calls.clear()

    def replay(self, request: Replay) -> None:
        """Repeats a call with some inputs in other places, and replies; Forgotten if it is not known.

        Raises:
            Exception: the engine's.
        """
        if (call := self._find(request.plan)) is None:
            return
        moved = {call.names[i]: self._lane.unpack(tensor) for i, tensor in request.moved}
        key = [number for _, tensor in request.moved for number in (tensor.block, tensor.offset)]
        self._run(call, call.feed_with(self._lane, moved), key)

    def replay_number(self, number: int) -> None:
        """Like :meth:`replay`, with all inputs in their places."""
        lane, call = self._lane, self._calls.get(number)
        if (
            call is None
            or (direct := call.direct) is None
            or self._drops != lane.mappings.drops
            or lane.arena.scratch(direct.nbytes) is not direct.scratch
        ):
            self._replay_in_place(number)
            return
        token = self._token
        token.attach(direct.cancel)
        try:
            direct.run()
        except Exception:  # as in PreparedCall: the unbound run raises the error
            call.cannot_bind()
        finally:
            token.detach()
        if call.direct is None:
            self._replay_in_place(number)
        else:
            lane.send_same()

    def _replay_in_place(self, number: int) -> None:
        if (call := self._find(number)) is not None:
            self._run(call, call.feed_with(self._lane, {}), [])

    def _find(self, number: int) -> PreparedCall | None:
        self.drop_unmapped()
        if (call := self._calls.get(number)) is None:
            self._lane.send(Forgotten())
        return call

    def _run(self, call: PreparedCall, feed: Feed, key: list[int]) -> None:
        if call.run(self._lane, self._backend, feed, key, self._token):
            return
        results = call.run_unbound(self._backend, feed, self._token)
        if call.form is not None and call.form.put(results, self._lane.arena):
            self._lane.send_same()
            return
        sent = self._lane.reply(results, keep=call.keep)
        if self._scratch is not (scratch := self._lane.arena.current_scratch):
            self._scratch = scratch
            for other in self._calls.values():
                other.on_scratch(scratch)
        call.learn(sent, self._lane)
        if self._pins is not None:
            self._pins.used({*call.blocks, *key[::2]}, [scratch])

    def drop_unmapped(self) -> None:
        """Drops what uses blocks that the caller dropped: their memory would never be freed."""
        if self._drops == self._lane.mappings.drops:
            return
        self._drops, is_mapped = self._lane.mappings.drops, self._lane.mappings.has
        self._calls = {n: call for n, call in self._calls.items() if all(map(is_mapped, call.blocks))}
        for call in self._calls.values():
            call.drop_unmapped(is_mapped)


def _nbytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
