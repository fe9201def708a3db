"""Encodes calls as messages and shared memory, and decodes their results.  One codec per lane.

Messages are sent by :mod:`onnx_dl.transport.client_lane`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from onnx_dl.errors import ProtocolError
from onnx_dl.protocol import lane as m
from onnx_dl.tensors.arena import Arena, Mappings
from onnx_dl.tensors.block import Reference, home_of
from onnx_dl.tensors.call_plans import (
    CallPlan,
    CallPlans,
    EncodedCall,
    EngineValue,
    Feed,
    InputLayout,
    can_repeat,
    key_of,
)
from onnx_dl.tensors.device_values import DeviceLoans, UnopenedTensor
from onnx_dl.tensors.foreign import ForeignArray, ForeignPlace, Written, bytes_of
from onnx_dl.tensors.foreign_tables import AnnouncedMemories
from onnx_dl.tensors.result_forms import in_one_place, reader_of
from onnx_dl.tensors.values import VIEW_FROM, Packer, Unpacker, as_it_is

Request = CallPlan | EncodedCall | m.Invoke | m.Taken | m.Touch | m.Hold | m.Unhold | m.Terminate | m.Trim
Answer = m.Result | m.PlacedResult | m.SameResult | int
"""Reply of a request that was executed without an error; a number stands for SameResult."""


class CallCodec:
    """Owner of the table of calls that repeat.  Calls nothing that sends or waits."""

    def __init__(self, arena: Arena, mappings: Mappings) -> None:
        """``arena``: the caller's blocks; ``mappings``: the worker's."""
        self._arena = arena
        self._mappings = mappings
        self.loans = DeviceLoans()
        # Not a method of this object: it would be in a cycle, and its memory would wait for a collection.
        self._unpacker = Unpacker(mappings.block, copy=True, device=self.loans.receive)
        self.plans = CallPlans()
        self._drops = 0
        """Number of blocks that the worker had dropped when the table was last reviewed."""

    def pack(self, values: Iterable[EngineValue]) -> list[m.Value]:
        """Copies the arrays in ``values`` to shared memory; see :class:`Packer`."""
        packer = Packer(self._arena)
        packed = packer.pack(values)
        self.loans.are_open |= packer.names_devices
        return packed

    def repeated(self, outputs: EngineValue, feed: Feed) -> CallPlan | None:
        """Prepares a call like the last one by copying its inputs to their places.  Returns its plan, which
        has :attr:`CallPlan.repeated`, as the request; None: it must be encoded by :meth:`encode_call`."""
        plan = self.plans.latest
        if (
            plan is None
            or (call := plan.repeated) is None
            or self._arena.memories.has_news  # a number alone would not tell the worker
            or not call.fill(outputs, feed, self._arena)
        ):
            return None
        return plan

    def encode_call(
        self,
        outputs: EngineValue,
        feed: Feed,
        options: dict[str, EngineValue] | None,
        *,
        keep: bool = False,
        background: bool = False,
    ) -> CallPlan | EncodedCall:
        """Encodes one inference.  Arrays in ``feed`` are copied, unless they lie in shared memory.

        Changes nothing that a reply of the worker depends on, so a call that is not sent after all needs no
        undoing.  ``keep``: the results are read by :meth:`references`; ``background``: the worker replies
        Started first.

        Raises: like :meth:`Packer.pack`.
        """
        # A number alone carries no news of memories that were closed.
        has_news = self._arena.memories.has_news
        if has_news:
            self._arena.memories.drop_closed()
        moved, feed = self._shared_inputs(feed)
        key = None
        if options is None and not background:
            try:
                key = key_of(outputs, feed, keep, moved)
                plan = self.plans.get(key)
            except TypeError:  # names that cannot be hashed: onnxruntime raises its own error
                plan = None
            if plan is not None and plan.inputs.fill(feed, self._arena):
                if moved is None and not has_news:
                    return plan
                places = [(index, (moved or {})[name]) for index, name in plan.moved]
                return EncodedCall(m.Replay(plan=plan.number, moved=places), plan)
        call, plan = self._encode_new(outputs, feed, moved or {}, key)
        call.options, call.keep, call.background = options, keep, background
        return EncodedCall(call, plan)

    def encode_placed(
        self, outputs: list[str], feed: Feed, places: Mapping[str, ForeignPlace]
    ) -> EncodedCall:
        """Encodes one inference with inputs or results in foreign memory.  Like :meth:`encode_call`, it
        changes nothing that needs undoing.

        Raises:
            ForeignMemoryError: a memory is closed, or does not have these bytes.
            TooManyMemories: the call names too many memories.
            Exception: like :meth:`Packer.pack`.
        """
        memories = self._arena.memories
        memories.next_message()
        foreign = [
            (name, _foreign(value, memories)) for name, value in feed.items() if type(value) is ForeignArray
        ]
        found = [(name, _place(place, memories)) for name, place in places.items()]
        copied = sum(array.nbytes for array in feed.values() if type(array) is ForeignArray)
        memories.copied = max(memories.copied, copied + sum(place.nbytes for place in places.values()))
        values_here = {name: value for name, value in feed.items() if type(value) is not ForeignArray}
        moved, others = self._shared_inputs(values_here)
        packer = Packer(self._arena, moved={id(others[name]): t for name, t in (moved or {}).items()})
        values = packer.pack(others.values())
        call = m.PlacedCall(
            outputs=outputs, feed=list(zip(others, values, strict=True)), foreign=foreign, places=found
        )
        return EncodedCall(call, None)

    def _shared_inputs(self, given: Feed) -> tuple[dict[str, m.Tensor] | None, Feed]:
        """Find the large arrays that lie in shared memory already.  Return their places, and the feed, in
        which a reference that the worker cannot be given is replaced by an array to be copied."""
        found, feed = None, given
        for name, value in given.items():
            if type(value) is Reference:
                block, offset = value.block, value.offset
            elif type(value) is np.ndarray and value.nbytes >= VIEW_FROM and (home := home_of(value)):
                block, offset = home, home.offset_of(value)
            else:
                continue
            if found is None and feed is given:
                self._arena.adoptions.next_message()
            if (number := self._arena.adoptions.number(block)) is None:
                if type(value) is Reference:
                    feed = {**feed, name: block.array(value.dtype.str, value.shape, offset)}
                continue
            found = found or {}
            found[name] = m.Tensor(value.dtype.str, value.shape, number, offset)
        return found, feed

    def _encode_new(
        self, outputs: EngineValue, feed: Feed, moved: dict[str, m.Tensor], key: tuple[object, ...] | None
    ) -> tuple[m.Call, CallPlan | None]:
        packer = Packer(self._arena, moved={id(feed[name]): tensor for name, tensor in moved.items()})
        packed_outputs, *values = packer.pack([as_it_is(outputs), *feed.values()])
        places = [(index, name) for index, name in enumerate(feed) if name in moved]
        plan = None
        if key is not None and can_repeat(feed):
            number = self.plans.next_number(packer.scratch)
            plan = CallPlan(key, number, InputLayout(packer, feed, values), places)
        call = m.Call(
            outputs=packed_outputs,
            feed=list(zip(feed, values, strict=True)),
            plan=None if plan is None else plan.number,
            moved=[index for index, _ in places],
        )
        return call, plan

    def decode(self, request: Request, reply: Answer) -> EngineValue:
        """Return the result of a request: small arrays as copies, large ones as views of its memory."""
        plan = _plan_of(request)
        if isinstance(reply, m.Result):
            self._learn(plan, reply.value)
            return self._unpacker.unpack(reply.value)
        if isinstance(reply, m.PlacedResult):
            self._learn(None, reply.value)
            return _merged(_placed_call(request).outputs, self._unpacker.unpack(reply.value), reply)
        plan = _with_results(plan)
        if not plan.readers:
            self._prepare_reading(plan)
        self.plans.latest = None if plan.repeated is None else plan
        return [read() for read in plan.readers]

    def taken(self) -> m.Taken:
        """Returns the request that ends the loan of the last results."""
        return m.Taken(by_value=self.loans.taken())

    def with_values(self, results: EngineValue, taken: m.Taken, reply: m.Result) -> list[EngineValue]:
        """Returns the results, in which those that could not be opened have their values.

        Raises:
            ProtocolError: there are more or fewer values than were asked for.
        """
        found, count = self.decode(taken, reply), len(taken.by_value)
        unopened = [type(one) for one in results if type(results) is list].count(UnopenedTensor)
        if type(found) is not list or not unopened == len(found) == count:
            raise ProtocolError("A worker sent other results by value than it was asked for.")
        values = iter(found)
        return [one._replace(value=next(values)) if type(one) is UnopenedTensor else one for one in results]

    def references(self, request: Request, reply: Answer) -> list[EngineValue]:
        """Return the results of a call with ``keep``: arrays as references, valid for as long as nothing else
        is sent on this lane, others as values."""
        plan = _plan_of(request)
        if isinstance(reply, m.Result):
            self._learn(plan, reply.value)
            if plan is None or plan.results is None:
                values: list[EngineValue] = self._unpacker.unpack(reply.value)
                return values
        return list(map(self._reference, _with_results(plan).results or []))

    def _reference(self, value: m.Value) -> EngineValue:
        if not isinstance(value, m.Tensor):
            return self._unpacker.unpack(value)
        return Reference(self._mappings.block(value.block), np.dtype(value.dtype), value.shape, value.offset)

    def _learn(self, plan: CallPlan | None, value: m.Value) -> None:
        """Notes where the results lie.  The worker remembers the same."""
        if self._mappings.drops != self._drops:
            self._drops = self._mappings.drops
            self.plans.forget_results(self._mappings.has)
        self.plans.latest = None
        if plan is not None:
            plan.forget_results()
            plan.results = in_one_place(value)
            self.plans.remember(plan)

    def _prepare_reading(self, plan: CallPlan) -> None:
        """Not before the first read, because looking at a block maps it."""
        copy = self._unpacker.copies.copy
        plan.readers = [
            reader_of(value, self._mappings.block(value.block), copy) for value in plan.results or []
        ]
        plan.prepare_repeating(self._mappings.block)


def _foreign(array: ForeignArray, memories: AnnouncedMemories) -> m.Foreign:
    array.memory.check(array.offset, array.nbytes)
    return m.Foreign(array.dtype.str, array.shape, memories.number(array.memory), array.offset)


def _place(place: ForeignPlace, memories: AnnouncedMemories) -> m.Place:
    place.memory.check(place.offset, place.nbytes)
    return m.Place(memories.number(place.memory), place.offset, place.nbytes)


def _merged(names: list[str], values: EngineValue, reply: m.PlacedResult) -> list[EngineValue]:
    """Return the results in order: those that were written, and the others.  Raises ProtocolError if these
    are not one for each name."""
    indices = [one.index for one in reply.written]
    is_complete = isinstance(values, list) and len(values) + len(indices) == len(names)
    is_ordered = indices == sorted(set(indices)) and all(0 <= index < len(names) for index in indices)
    if not (is_complete and is_ordered):
        raise ProtocolError(f"A worker answered a call for {len(names)} results with others.")
    results = list(values)
    for one in reply.written:
        results.insert(one.index, _written(one))
    return results


def _written(one: m.WrittenResult) -> Written:
    try:
        dtype = np.dtype(one.dtype)
        bytes_of(dtype, one.shape)
    except (TypeError, ValueError, SyntaxError) as error:  # numpy's, and ForeignMemoryError
        raise ProtocolError(f"A worker wrote a result that cannot be: {error}.") from None
    return Written(dtype, one.shape)


def _placed_call(request: Request) -> m.PlacedCall:
    if isinstance(request, EncodedCall) and isinstance(request.message, m.PlacedCall):
        return request.message
    raise ProtocolError("A worker answered another request like a call with places.")


def _plan_of(request: Request) -> CallPlan | None:
    if isinstance(request, CallPlan):
        return request
    return request.plan if isinstance(request, EncodedCall) else None


def _with_results(plan: CallPlan | None) -> CallPlan:
    if plan is None or plan.results is None:
        raise ProtocolError("A worker answered that its results lie where none ever lay.")
    return plan
