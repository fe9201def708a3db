"""Messages between a client and a worker: calls, and the values in them."""

from __future__ import annotations

from typing import Any

import msgspec

from onnx_dl.protocol.codec import Message, Reader
from onnx_dl.protocol.failures import Failure


class Tensor(msgspec.Struct, frozen=True, tag="t", array_like=True):
    """An array in shared memory: numpy dtype string, shape, block and byte offset into it.

    ``leased``: the receiver keeps the block until it clears the block's lease word; otherwise the bytes are
    valid until the next message on the same lane.
    """

    dtype: str
    shape: tuple[int, ...]
    block: int
    offset: int
    leased: bool = False


class Text(msgspec.Struct, frozen=True, tag="s", array_like=True):
    """An object array of text: its shape, and where its items lie as a :class:`Packed` list, in C order.

    Block 0: it has none.
    """

    shape: tuple[int, ...]
    block: int
    offset: int


class Packed(msgspec.Struct, frozen=True, tag="m", array_like=True):
    """A list or dict of plain values in shared memory, as msgpack.

    At ``offset`` lie two 64-bit numbers: where in the block its bytes begin, and how many there are.  So the
    same message names values of any length.  Valid until the next message on the same lane.
    """

    block: int
    offset: int


class Items(msgspec.Struct, frozen=True, tag="i", array_like=True):
    """A container that holds arrays, or whose type msgpack would lose: list, tuple, dict, numpy scalar."""

    kind: str
    items: list[Value]


class Plain(msgspec.Struct, frozen=True, tag="p", array_like=True):
    """None, bool, int, float, str, bytes, and lists and dicts of these."""

    value: Any


Value = Tensor | Text | Packed | Items | Plain


class LaneHello(Message):
    """First on a lane.  ``reply_to`` is the ZeroMQ address at which the client listens for calls' replies;
    None: calls go over this socket.  ``poll``: both ends look for messages for a moment before they sleep."""

    version: int
    secret: str
    reply_to: str | None = None
    poll: bool = False
    model: str = ""


class LaneOpen(Message):
    """The worker's first message where the calls go, to prove that it is the worker.

    ``thread``: the native id of the thread that serves the lane.
    """

    secret: str
    thread: int


class Envelope(Message, omit_defaults=True):
    """A message with what its receiver must know of blocks first, or one that is too long for a packet.

    ``shared``: number and size of new blocks, whose memfds come first among the descriptors; ``dropped``:
    blocks that will not be used again.  ``letter``: block and length; the first bytes of that block are an
    Envelope with the message, which has neither ``shared`` nor ``letter``.
    """

    shared: list[tuple[int, int]] = []
    dropped: list[int] = []
    message: msgspec.Raw = msgspec.Raw()
    letter: tuple[int, int] | None = None


class Call(Message):
    """Run the model: names of outputs, feed, RunOptions.

    ``plan``: remember it under this number when its result is sent, and if that is 0, forget all others;
    ``moved``: indices in the feed of what will lie elsewhere then;
    ``keep``: lease nothing, the client does nothing else on this lane until it needs the results no more.
    """

    outputs: Value
    feed: list[tuple[Any, Value]]
    options: dict[str, Any] | None = None
    plan: int | None = None
    moved: list[int] = []
    keep: bool = False
    background: bool = False
    """Answered by Started as soon as it runs, and then by its result."""


class Again(Message):
    """The Call that is remembered as ``plan``, with other bytes in the same places.

    ``moved``: what lies elsewhere each time, as (index in the feed, where now).
    """

    plan: int
    moved: list[tuple[int, Tensor]] = []


class Invoke(Message):
    """Call another method of the session."""

    method: str
    args: list[Value] = []


class Terminate(Message):
    """End the call that this thread of the worker is at, if it is still that request of its lane."""

    thread: int
    request: int


class Touch(Message):
    """Count as a use that does nothing."""


class Hold(Message):
    """Keep the model loaded until Unhold, or until the lane closes."""


class Unhold(Message):
    """The block that Hold began has ended."""


class Trim(Message):
    """Give back the memory that nobody needs now.  No use of the model."""


class Result(Message):
    """What a Call, Again, Invoke, Touch, Hold, Unhold, Trim or Terminate returned."""

    value: Value


class Same(Message):
    """The last Result of this plan, with other bytes in the same places."""


class CallFailed(Message):
    """What a Call, Again or Invoke raised, or why there is no lane."""

    failure: Failure


class Started(Message):
    """A Call in the background runs; its result is still to come."""


class Forgotten(Message):
    """Not executed: the worker does not remember this call.  Say it in full."""


class Draining(Message):
    """Not executed: the worker takes no new work.  Acquire again."""


LaneRequest = Call | Again | Invoke | Terminate | Touch | Hold | Unhold | Trim | LaneHello | Envelope
LaneReply = LaneOpen | Result | Same | Started | CallFailed | Forgotten | Draining | Envelope
lane_request = Reader(LaneRequest)
lane_reply = Reader(LaneReply)
