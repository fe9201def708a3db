"""Calls of one caller whose inputs and results lie in foreign memory, on the worker's side.

A memory that may not be mapped is copied: inputs to memory of this lane that is used again for each call,
results from such memory to their places.  Of a mapped one the engine gets the bytes themselves, and writes
results to their places.  From the second call of a kind on (names, dtypes, shapes, sizes of places, and the
present places in mapped memory), the engine runs bound to these places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from onnx_dl.errors import EngineError, OnnxDLError, ProtocolError
from onnx_dl.protocol import codec
from onnx_dl.protocol import lane as m
from onnx_dl.tensors.arena import Arena, NoPeer
from onnx_dl.tensors.block import Array, Block, align
from onnx_dl.tensors.foreign import as_bytes, bytes_of, is_only_bytes
from onnx_dl.tensors.foreign_results import check_room
from onnx_dl.tensors.foreign_tables import PeerMemory, overlap
from onnx_dl.transport.worker_lane import WorkerLane
from onnx_dl.workers.engines.base import Backend, BoundRun, CancelToken, Feed

_MOST_KINDS: Final = 32
"""Kinds of calls that are remembered."""
_STEP: Final = 4 << 20
"""Bytes of a result that are written before it is asked again whether the call was given up."""

_Blocks = tuple[Block | None, Block | None]
"""Blocks of copied inputs and results, if there are such."""
_Slice = tuple[PeerMemory, int, int]
"""A memory, an offset and a number of bytes."""


class _Input(NamedTuple):
    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    memory: PeerMemory
    offset: int
    nbytes: int
    in_place: bool
    """True if the engine reads the mapping."""

    @property
    def slice(self) -> _Slice:
        return self.memory, self.offset, self.nbytes


class _Target(NamedTuple):
    """An array that a bound run writes a result to."""

    array: Array
    place: m.Place
    in_place: bool


class _Form(NamedTuple):
    """Dtype and shape of each result of a kind of call."""

    dtypes: list[np.dtype[np.generic]]
    shapes: list[tuple[int, ...]]


class _Bound(NamedTuple):
    run: BoundRun
    targets: list[_Target]
    inputs: list[Array]
    """Kept, because the engine knows their addresses only."""
    blocks: _Blocks
    reply: bytes


class _Kind:
    """One kind of call, which may be made again."""

    __slots__ = ("bound", "form")

    def __init__(self, form: _Form | None) -> None:
        self.form = form
        """None: the call cannot run bound."""
        self.bound: _Bound | None = None

    def keep_to(self, blocks: _Blocks) -> None:
        """Drops the bound run if it uses another block for copies than these."""
        used = (None, None) if self.bound is None else self.bound.blocks
        if any(one is not None and one is not now for one, now in zip(used, blocks, strict=True)):
            self.bound = None


class PlacedCalls:
    """The calls with places of one lane."""

    def __init__(self, lane: WorkerLane, backend: Backend, token: CancelToken) -> None:
        self._lane = lane
        self._backend = backend
        self._token = token
        self._inputs, self._results = Arena(NoPeer()), Arena(NoPeer())
        """Memory for copies."""
        self._reviewed: tuple[int, int] = 0, 0
        """Numbers of the blocks for copies when bound runs were last reviewed."""
        self._kinds: dict[tuple[object, ...], _Kind] = {}
        self._drops = 0

    def blocks(self) -> _Blocks:
        """Returns the present blocks for copies."""
        return self._inputs.current_scratch, self._results.current_scratch

    def trim(self) -> None:
        """Gives the memory for copies back."""
        self._kinds.clear()
        self._inputs.trim()
        self._results.trim()

    def drop_unmapped(self) -> None:
        """Drops what uses memories that the caller dropped: they would stay mapped."""
        if self._drops != self._lane.memories.drops:
            self._drops = self._lane.memories.drops
            self._kinds.clear()

    def call(self, request: m.PlacedCall) -> None:
        """Makes the call and replies.

        Raises:
            ForeignMemoryError: a memory does not have the bytes; PlaceTooSmall: a result does not fit.
                Nothing was written, unless a memory was truncated meanwhile.
            EngineError: the call was given up.  Nothing is written from then on.
            ProtocolError: the request contradicts itself.
            DescriptorsExhausted: this process had no descriptor for a memory.  The model did not run.
            Exception: the engine's.
        """
        for _, place in request.places:  # not after the run
            self._lane.memories.memory(place.memory)
        try:
            inputs = [self._input(name, value) for name, value in request.foreign]
            arrays, block = self._read(inputs)
        except OnnxDLError:
            raise
        except (
            TypeError,
            ValueError,
            OverflowError,
            SyntaxError,
        ) as error:  # numpy's, for what a peer made up
            raise ProtocolError(f"An input contradicts itself: {error}.") from None
        key = None if request.feed else self._key_of(request, inputs)
        kind = self._kinds.get(key) if key is not None else None
        if kind is not None and self._run_bound(kind, request, inputs, arrays, block):
            return
        feed: Feed = {name: self._lane.unpack(value) for name, value in request.feed}
        feed.update(zip((one.name for one in inputs), arrays, strict=True))
        results = self._backend.run(request.outputs, feed, None, self._token)
        written, others = self._write(request, results)
        self._lane.reply_placed(others, written)
        self._drop_unused_blocks()
        if key is not None and kind is None:
            if len(self._kinds) >= _MOST_KINDS:
                self._kinds.clear()
            self._kinds[key] = _Kind(_form_of(results))

    def _drop_unused_blocks(self) -> None:
        """Drops bound runs that use other blocks for copies than the present ones: these would never be
        freed while the lane is in use."""
        present = self.blocks()
        numbers = _number(present[0]), _number(present[1])
        if numbers == self._reviewed:
            return
        self._reviewed = numbers
        for kind in self._kinds.values():
            kind.keep_to(present)

    # --- inputs -------------------------------------------------------------------------------------------

    def _input(self, name: str, value: m.Foreign) -> _Input:
        memory = self._lane.memories.memory(value.memory)
        dtype = np.dtype(value.dtype)
        nbytes = bytes_of(dtype, value.shape)
        memory.check(value.offset, nbytes)
        in_place = memory.is_mapped and nbytes > 0 and align(value.offset) == value.offset
        return _Input(name, dtype, value.shape, memory, value.offset, nbytes, in_place)

    def _read(self, inputs: Sequence[_Input]) -> tuple[list[Array], Block | None]:
        """The arrays, and the block of those that were copied."""
        copied = sum(align(one.nbytes) for one in inputs if not one.in_place)
        block = self._inputs.scratch(copied) if copied else None
        arrays: list[Array] = []
        offset = 0
        for one in inputs:
            if one.in_place:
                arrays.append(one.memory.view(one.offset, one.nbytes).view(one.dtype).reshape(one.shape))
            elif block is None or not one.nbytes:
                arrays.append(np.empty(one.shape, one.dtype))
            else:
                array = block.array(one.dtype.str, one.shape, offset)
                one.memory.read(one.offset, as_bytes(array))
                arrays.append(array)
                offset += align(one.nbytes)
        return arrays, block

    # --- results ------------------------------------------------------------------------------------------

    def _write(
        self, request: m.PlacedCall, results: Sequence[object]
    ) -> tuple[list[m.WrittenResult], list[object]]:
        """Writes the results that have places, if all fit; returns these, and the others."""
        places = dict(request.places)
        found: list[tuple[int, m.Place, Array]] = []
        others: list[object] = []
        for index, (name, result) in enumerate(zip(request.outputs, results, strict=True)):
            place = places.get(name)
            if place is None or type(result) is not np.ndarray or not is_only_bytes(result.dtype):
                others.append(result)
                continue
            check_room(name, result.nbytes, place.nbytes)
            self._lane.memories.memory(place.memory).check(place.offset, place.nbytes)
            found.append((index, place, result))
        for _, place, array in found:
            self._put(place, np.ascontiguousarray(array))
        return [m.WrittenResult(index, a.dtype.str, a.shape) for index, _, a in found], others

    def _put(self, place: m.Place, array: Array) -> None:
        """Writes one result.  Raises EngineError if the call was given up: its caller may have closed the
        memory since, and its maker may use the bytes for something else."""
        memory, data = self._lane.memories.memory(place.memory), as_bytes(array)
        for start in range(0, data.nbytes, _STEP):
            if self._token.is_cancelled:
                raise EngineError("The run was given up, so its results are not written.")
            memory.write(place.offset + start, data[start : start + _STEP])

    # --- bound runs ---------------------------------------------------------------------------------------

    def _run_bound(
        self,
        kind: _Kind,
        request: m.PlacedCall,
        inputs: Sequence[_Input],
        arrays: list[Array],
        block: Block | None,
    ) -> bool:
        """Runs the call with results at their places, and replies.  False: it has to run unbound."""
        if kind.form is None:
            return False
        for _, place in request.places:
            self._lane.memories.memory(place.memory).check(place.offset, place.nbytes)
        try:
            bound = self._bound(kind, kind.form, request, inputs, arrays, block)
            if bound is None:
                kind.form = None
                return False
            self._token.attach(bound.run.cancel)
            try:
                bound.run.run()
            finally:
                self._token.detach()
        except Exception:  # the unbound run raises the error, or finds results of other shapes
            if not self._token.is_cancelled:
                kind.form = None
            kind.bound = None
            return False
        if self._token.is_cancelled:  # too late for this run, and it would end the next one
            kind.bound = None
        for target in bound.targets:
            if not target.in_place:
                self._put(target.place, target.array)
        self._lane.send(bound.reply)
        self._drop_unused_blocks()
        return True

    def _bound(
        self,
        kind: _Kind,
        form: _Form,
        request: m.PlacedCall,
        inputs: Sequence[_Input],
        arrays: list[Array],
        block: Block | None,
    ) -> _Bound | None:
        """The bound run of this kind for the present places; None: the engine has none."""
        places = dict(request.places)
        slices = [one.slice for one in inputs if one.in_place]
        in_place = [self._is_in_place(places[name], slices) for name in request.outputs]
        sizes = [bytes_of(*one) for one in zip(form.dtypes, form.shapes, strict=True)]
        copied = sum(align(size) for size, mapped in zip(sizes, in_place, strict=True) if not mapped)
        scratch = self._results.scratch(copied) if copied else None
        known = kind.bound
        if known is not None and known.blocks == (block, scratch):
            # The key has the places in mapped memory.  Those that are copied to may differ.
            targets = [
                target._replace(place=places[name])
                for name, target in zip(request.outputs, known.targets, strict=True)
            ]
            return known._replace(targets=targets)
        targets, offset = [], 0
        for name, dtype, shape, size, mapped in zip(
            request.outputs, form.dtypes, form.shapes, sizes, in_place, strict=True
        ):
            place = places[name]
            if mapped:
                view = self._lane.memories.memory(place.memory).view(place.offset, size)
                array: Array = view.view(dtype).reshape(shape)
            else:
                assert scratch is not None
                array = scratch.array(dtype.str, shape, offset)
                offset += align(size)
            targets.append(_Target(array, place, mapped))
        feed: Feed = dict(zip((one.name for one in inputs), arrays, strict=True))
        run = self._backend.bind(request.outputs, feed, [target.array for target in targets])
        if run is None:
            return None
        written = [
            m.WrittenResult(index, d.str, shape)
            for index, (d, shape) in enumerate(zip(form.dtypes, form.shapes, strict=True))
        ]
        reply = codec.encode(m.PlacedResult(value=m.Items("list", []), written=written))
        kind.bound = _Bound(run, targets, arrays, (block, scratch), reply)
        return kind.bound

    def _key_of(self, request: m.PlacedCall, inputs: Sequence[_Input]) -> tuple[object, ...] | None:
        """Equal for calls that can use one bound run; None: some result has no place, or shares its name."""
        names = tuple(request.outputs)
        if len(set(names)) != len(names) or set(names) != {name for name, _ in request.places}:
            return None
        fed = [
            (one.name, value.dtype, value.shape, (value.memory, value.offset) if one.in_place else None)
            for one, (_, value) in zip(inputs, request.foreign, strict=True)
        ]
        memory = self._lane.memories.memory
        places = [
            (name, place if memory(place.memory).is_mapped else place.nbytes)
            for name, place in request.places
        ]
        return names, tuple(fed), tuple(places)

    def _is_in_place(self, place: m.Place, inputs: Sequence[_Slice]) -> bool:
        """True if the engine may write to this place: it is mapped and aligned, and no input lies there."""
        memory = self._lane.memories.memory(place.memory)
        whole = memory, place.offset, place.nbytes
        is_free = not any(overlap(whole, one) for one in inputs)
        return memory.is_mapped and align(place.offset) == place.offset and is_free


def _form_of(results: Sequence[object]) -> _Form | None:
    """The form of results that were written; None: the next ones cannot be bound."""
    arrays = [result for result in results if type(result) is np.ndarray and result.nbytes]
    if len(arrays) != len(results) or not all(is_only_bytes(array.dtype) for array in arrays):
        return None
    return _Form([array.dtype for array in arrays], [array.shape for array in arrays])


def _number(block: Block | None) -> int:
    return 0 if block is None else block.number
