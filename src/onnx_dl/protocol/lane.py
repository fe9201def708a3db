"""Messages between a client and a worker: calls, and the values in them."""

from __future__ import annotations

from typing import Any

import msgspec

from onnx_dl.protocol.codec import Message, Reader
from onnx_dl.protocol.failures import Failure

# Client <-> worker.  Blocks and EOF travel over a Unix socket, calls over the same socket or over ZeroMQ.


class Tensor(msgspec.Struct, frozen=True, tag="t", array_like=True):
    """An array in shared memory: numpy dtype string, shape, block number and byte offset in the block.

    ``held``: the receiver holds the block until it clears the first word of its header.  Otherwise the bytes
    are valid until the next message on the same lane.
    """

    dtype: str
    shape: tuple[int, ...]
    block: int
    offset: int
    held: bool = False


class Text(msgspec.Struct, frozen=True, tag="s", array_like=True):
    """An object array of text: its shape, and the place of its items as a :class:`Packed` list in C order.
    Block 0: it has no items."""

    shape: tuple[int, ...]
    block: int
    offset: int


class Packed(msgspec.Struct, frozen=True, tag="m", array_like=True):
    """A list or dict of plain values in shared memory, as msgpack.

    At ``offset`` lie two 64-bit numbers: the offset of its bytes in the block, and their number.  So the same
    message can refer to values of any length.  Valid until the next message on the same lane.
    """

    block: int
    offset: int


class Items(msgspec.Struct, frozen=True, tag="i", array_like=True):
    """A container of arrays, or one whose type msgpack would lose: list, tuple, dict, numpy scalar."""

    kind: str
    items: list[Value]


class Plain(msgspec.Struct, frozen=True, tag="p", array_like=True):
    """None, bool, int, float, str, bytes, and lists and dicts of these."""

    value: Any


Value = Tensor | Text | Packed | Items | Plain


class Foreign(msgspec.Struct, frozen=True, array_like=True):
    """An input in memory that neither side has made: numpy dtype string, shape, number of the memory and byte
    offset in it.  C-contiguous."""

    dtype: str
    shape: tuple[int, ...]
    memory: int
    offset: int


class Place(msgspec.Struct, frozen=True, array_like=True):
    """A place for a result: number of a foreign memory, byte offset in it, and the bytes that it has."""

    memory: int
    offset: int
    nbytes: int


class WrittenResult(msgspec.Struct, frozen=True, array_like=True):
    """A result that was written to its place: its index, numpy dtype string and shape."""

    index: int
    dtype: str
    shape: tuple[int, ...]


class LaneHello(Message):
    """First message on a lane.

    ``reply_to``: ZeroMQ address at which the client receives replies; None: calls go over this socket.
    ``model``: key of the model, if the worker has several.
    """

    version: int
    secret: str
    reply_to: str | None = None
    model: str = ""


class LaneOpen(Message):
    """The worker's first message on the channel for calls; the secret proves that it is the worker.
    ``thread``: native id of the thread that serves the lane."""

    secret: str
    thread: int


class Envelope(Message, omit_defaults=True):
    """A message with news of blocks that its receiver needs first, or one that is too long for a packet.

    ``shared``: number and size of new blocks; their memfds come first among the descriptors.  ``foreign``:
    number and size of new foreign memories, and whether they may be mapped; their descriptors come next.
    ``parts``: number and size of memory of a GPU that was mapped by parts; their descriptors come last.
    ``dropped``: those of all three that will not be used again.  ``letter``: block and length; the first
    bytes of that block are an Envelope with the message.  That envelope has only ``dropped`` beside it.
    """

    shared: list[tuple[int, int]] = []
    foreign: list[tuple[int, int, bool]] = []
    parts: list[tuple[int, int]] = []
    dropped: list[int] = []
    message: msgspec.Raw = msgspec.Raw()
    letter: tuple[int, int] | None = None


class Call(Message):
    """Run the model: names of outputs, feed, RunOptions.

    ``plan``: remember the call under this number when its result is sent; 0: and forget all others.
    ``moved``: indices in the feed of values that lie in another place at each repetition.
    ``keep``: take no blocks for results; the client sends nothing on this lane until it no longer needs the
    results.
    """

    outputs: Value
    feed: list[tuple[Any, Value]]
    options: dict[str, Any] | None = None
    plan: int | None = None
    moved: list[int] = []
    keep: bool = False
    background: bool = False
    """Answer with Started as soon as it runs, and later with its result."""


class Replay(Message):
    """Repeat the Call that is remembered as ``plan``, with new bytes in the same places.  ``moved``: values
    that lie in another place each time, as (index in the feed, present place)."""

    plan: int
    moved: list[tuple[int, Tensor]] = []


class PlacedCall(Message):
    """Run the model with inputs and results in foreign memory.

    ``outputs``: names of all results.  ``feed``: the other inputs.  ``foreign``: inputs in foreign memory, by
    name.  ``places``: places of results, by name.
    """

    outputs: list[str]
    feed: list[tuple[str, Value]] = []
    foreign: list[tuple[str, Foreign]] = []
    places: list[tuple[str, Place]] = []


class Invoke(Message):
    """Call another method of the session, with these arguments."""

    method: str
    args: list[Value] = []


class Taken(Message):
    """Follows a Result with results that are lent, before anything else on this lane: the client has
    copied them.

    ``by_value``: those that it cannot open, by their order among the lent ones.  Its Result has their values.
    """

    by_value: list[int] = []


class Terminate(Message):
    """Cancel the call that this thread of the worker executes, if it is still that request of its lane."""

    thread: int
    request: int


class Touch(Message):
    """Count as a use of the model, without a call."""


class Hold(Message):
    """Keep the model loaded until Unhold or until the lane closes."""


class Unhold(Message):
    """End the hold that Hold began."""


class Trim(Message):
    """Return unused memory to the system.  Does not count as a use."""


class Result(Message):
    """The return value of a Call, Replay, Invoke, Taken, Touch, Hold, Unhold, Trim or Terminate."""

    value: Value


class PlacedResult(Message):
    """The result of a PlacedCall.  ``value``: a list of the results that were not written to a place, in
    order; ``written``: the others."""

    value: Value
    written: list[WrittenResult] = []


class SameResult(Message):
    """The last Result of this plan, with new bytes in the same places."""


class CallFailed(Message):
    """The exception of a Call, Replay or Invoke, or the reason why no lane is opened."""

    failure: Failure


class Started(Message):
    """A background Call runs; its result follows."""


class Forgotten(Message):
    """Not executed: the worker does not remember this call.  Send the full Call."""


class Draining(Message):
    """Not executed: the worker accepts no new calls.  Acquire the model again."""


LaneRequest = (
    Call
    | Replay
    | PlacedCall
    | Invoke
    | Taken
    | Terminate
    | Touch
    | Hold
    | Unhold
    | Trim
    | LaneHello
    | Envelope
)
LaneReply = (
    LaneOpen | Result | PlacedResult | SameResult | Started | CallFailed | Forgotten | Draining | Envelope
)

lane_request: Reader[LaneRequest] = Reader(LaneRequest)
lane_reply: Reader[LaneReply] = Reader(LaneReply)
