"""News of a lane's descriptors: each is announced as what it is, and travels in that order."""

from __future__ import annotations

import os
import socket

from onnx_dl.protocol import codec, lane
from onnx_dl.tensors.foreign_tables import PeerPart
from onnx_dl.transport.lane_socket import LaneSocket, Notices
from onnx_dl.transport.sockets import Channel


def test_new_ones_in_order_and_those_that_went_before_they_were_told() -> None:
    notices = Notices()
    notices.part(3, 4096, part := os.open("/dev/null", os.O_RDWR))
    notices.foreign(2, 64, True, file := os.memfd_create("file"))
    notices.shared(1, 128, block := os.memfd_create("block"))
    notices.part(4, 8192, os.open("/dev/null", os.O_RDWR))
    assert notices.room == 60
    notices.dropped(4)
    assert notices and not notices.has_drops and notices.room == 61
    told = notices.new()
    assert (told.shared, told.foreign, told.parts) == ([(1, 128)], [(2, 64, True)], [(3, 4096)])
    assert notices.descriptors() == [block, file, part]
    notices.sent(0)
    assert not notices


def test_a_part_reaches_the_worker_and_is_dropped() -> None:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours, theirs = (Channel(end) for end in ends)
    caller = LaneSocket(ours, lane.lane_reply, keep_descriptors=True)
    worker = LaneSocket(theirs, lane.lane_request, keep_descriptors=False, most_foreign=2)
    number = caller.arena.memories._next_number()
    caller._notices.part(number, 4096, os.open("/dev/null", os.O_RDWR))
    caller.send(codec.encode(lane.Touch()))
    assert isinstance(worker.next(), lane.Touch)
    assert isinstance(worker.memories.part(number), PeerPart)
    caller._notices.dropped(number)
    caller.send(codec.encode(lane.Touch()))
    worker.next()
    assert number not in worker.memories._memories
    ours.close()
    theirs.close()
