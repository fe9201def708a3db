"""A host that is in use, and a peer that has its secrets and says what it likes on every socket.

What a peer may ask for (end a model, end the host) it is not made to ask for; everything else must end
nothing but its own connections.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import psutil

from onnx_dl import InferenceSessionProxy, ModelHost
from onnx_dl.client import launcher
from onnx_dl.errors import ProtocolError
from onnx_dl.protocol import codec, lane
from onnx_dl.protocol.control import Acquire, AskStatus, ClientHello, Granted, Shutdown, Unload, from_client
from onnx_dl.tensors import segment
from onnx_dl.transport import zmtp
from onnx_dl.transport.lane_socket import PACKET
from tests.fuzz import descriptors, examples, mutation
from tests.fuzz.mutation import Mutator
from tests.support.slow import identity_model
from tests.support.waiting import DEADLINE, allowed, eventually, with_standby

_MIGHTY = (Shutdown, Unload, Acquire)
"""What ends a model or starts one, for whoever may ask."""
_TURN = 50
"""Frames to one kind of socket before the next has its turn."""


def feed(frames: int, seed: int, only: str = "") -> Counter[str]:
    """So many frames, while a well-behaved client calls on.

    ``only``: a part of the name of a kind of socket.
    """
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    with _host() as (host, rogue), WellBehaved(host) as client:
        rogue.learn(client.granted())
        sockets = [each for each in rogue.sockets(rng) if only in each[0]]
        supervisor, worker = rogue.processes()
        with_standby(supervisor)
        belongings = _belongings(supervisor, worker)
        while sum(counts.values()) < frames:
            name, say = rng.choice(sockets)
            counts[name] += say()
            client.goes_on(f"seed {seed}, {name}")
        rogue.close()
        assert rogue.processes() == (supervisor, worker), "somebody ended"
        eventually(
            lambda: _no_more(supervisor, worker, belongings), f"no more is held than {belongings}", 60.0
        )
    return counts


def _belongings(*pids: int) -> list[tuple[int, int]]:
    """Descriptors and threads of these processes."""
    return [(process.num_fds(), process.num_threads()) for process in map(psutil.Process, pids)]


def _no_more(supervisor: int, worker: int, before: list[tuple[int, int]]) -> bool:
    """But for the thread that writes what people read, which starts when there is something to say."""
    now = _belongings(supervisor, worker)
    return all(
        fds <= most + 4 and threads <= few + 1
        for (fds, threads), (most, few) in zip(now, before, strict=True)
    )


@contextlib.contextmanager
def _host() -> Iterator[tuple[ModelHost, Rogue]]:
    found: list[tuple[str, str]] = []
    start = launcher.start

    def started(*args: Any, **kwargs: Any) -> Any:
        made = start(*args, **kwargs)
        found.append(made[1:])
        return made

    changed = {"ONNX_DL_METRICS": "127.0.0.1:0", "ONNX_DL_LANE": "socket"}
    with mock.patch.object(launcher, "start", started), mock.patch.dict(os.environ, changed):
        host = ModelHost()
        host.start()
    with host:
        rogue = Rogue(host, *found[0])
        with contextlib.closing(rogue):
            yield host, rogue


class WellBehaved:
    """A thread that calls a model all the time and looks at each result."""

    def __init__(self, host: ModelHost) -> None:
        self.proxy = InferenceSessionProxy(identity_model(), providers=["CPUExecutionProvider"], host=host)
        self.calls = 0
        self.wrong = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._call)

    def __enter__(self) -> WellBehaved:
        self.proxy.load()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(allowed(DEADLINE))
        self.proxy.close()

    def goes_on(self, meanwhile: str) -> None:
        """Another call comes back, and is right."""
        calls = self.calls
        eventually(lambda: self.calls > calls or self.wrong, f"a call; {meanwhile}", 60.0)
        assert not self.wrong, f"{meanwhile}: {self.wrong}"

    def granted(self) -> Granted:
        """What it was told of its worker."""
        assert self.proxy._handle.served is not None
        pool = self.proxy._handle.served.worker.pool
        assert pool is not None
        return pool.granted

    def _call(self) -> None:
        while not self._stop.wait(0.001):
            x = np.full(1 + self.calls % 300, self.calls, np.float32)
            try:
                (y,) = self.proxy.run(None, {"x": x}, timeout=60.0)
            except Exception as error:
                self.wrong = f"{type(error).__name__}: {error}"
                return
            if not np.array_equal(x, y):
                self.wrong = f"{y} instead of {x}"
                return
            self.calls += 1


class Rogue:
    """The peer."""

    def __init__(self, host: ModelHost, address: str, secret: str) -> None:
        self._host, self._address, self._secret = host, address, secret
        self._name = os.urandom(16)
        self._open = contextlib.ExitStack()
        self._odd = self._open.enter_context(contextlib.closing(descriptors.Odd()))
        self._control: socket.socket | None = None
        self._lifeline: socket.socket | None = None
        self._granted: Granted | None = None
        self._metrics: tuple[str, int] | None = None

    def close(self) -> None:
        self._hang_up()
        self._open.close()

    def processes(self) -> tuple[int, int]:
        status = self._host.snapshot()
        (worker,) = [model.pid for model in status.models if model.pid is not None]
        return status.supervisor_pid, worker

    def learn(self, granted: Granted) -> None:
        """What any client is told: where the worker listens, and its secret."""
        snapshot = self._host.snapshot()
        host, _, port = str(snapshot.metrics).rpartition(":")
        self._metrics = host, int(port)
        self._granted = granted

    def sockets(self, rng: random.Random) -> list[tuple[str, Any]]:
        hello = ClientHello(version=codec.PROTOCOL_VERSION, secret=self._secret, client=b"r" * 16)
        lifeline = mutation.msgpack(rng, [codec.encode(hello), *examples.frames("on_lifeline", rng)])
        greeting = zmtp.GREETING + zmtp.ready(Socket_Type=b"DEALER", Identity=self._name)
        streams = [
            greeting,
            greeting + zmtp.frame(codec.encode(AskStatus(ticket=1))),
            greeting + zmtp.frame(b"x" * 300),
        ]
        control = mutation.msgpack(rng, examples.frames("from_client", rng))
        http = Mutator(
            rng, [_REQUEST, _REQUEST.replace(b"/metrics", b"/healthz"), _REQUEST.replace(b"\r\n", b"\n")]
        )
        found = [
            ("lifeline", lambda: self._packets(f"{self._address}/lifeline", lifeline, rng)),
            ("control, a stranger", lambda: self._strangers(Mutator(rng, streams), rng)),
            ("control, a client", lambda: self._messages(control, rng)),
            ("metrics", lambda: self._requests(http, rng)),
        ]
        assert self._granted is not None
        return found + self._lane_sockets(rng, self._granted)

    def _lane_sockets(self, rng: random.Random, granted: Granted) -> list[tuple[str, Any]]:
        hello = lane.LaneHello(version=codec.PROTOCOL_VERSION, secret=granted.secret)
        first = lane.Envelope(shared=[(1, 0)], message=msgspec.Raw(codec.encode(hello)))
        greetings = mutation.msgpack(rng, [codec.encode(first), codec.encode(hello)])
        requests = mutation.msgpack(rng, examples.frames("lane_request", rng) + _calls())
        return [
            ("lane, a stranger", lambda: self._packets(granted.address, greetings, rng)),
            ("lane, a caller", lambda: self._caller(codec.encode(first), granted.address, requests, rng)),
        ]

    # --- each kind of socket ------------------------------------------------------------------------------

    def _packets(self, address: str, mutator: Mutator, rng: random.Random) -> int:
        for _ in range(_TURN // 2):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock, contextlib.suppress(OSError):
                sock.connect(f"\0{address}")
                for _ in range(2):
                    self._post(sock, mutator.frame()[: 60 << 10], rng)
        return _TURN

    def _post(self, sock: socket.socket, data: bytes, rng: random.Random) -> bool:
        fds = [self._odd.some(rng) for _ in range(rng.choice((0, 0, 1, 2, 3)))]
        try:
            socket.send_fds(sock, [data], fds, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    def _strangers(self, mutator: Mutator, rng: random.Random) -> int:
        for _ in range(_TURN):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock, contextlib.suppress(OSError):
                sock.connect(f"\0{self._address}/control")
                data = mutator.frame()
                cut = rng.randrange(len(data) + 1)
                for part in (data[:cut], data[cut:]):
                    sock.send(part, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        return _TURN

    def _messages(self, mutator: Mutator, rng: random.Random) -> int:
        for _ in range(_TURN):
            data = mutator.frame()
            if rng.random() < 0.3:
                self._heard()
            if self._may_say(data) and not self._say(zmtp.frame(data)):
                self._hang_up()
        return _TURN

    @staticmethod
    def _may_say(data: bytes) -> bool:
        try:
            return not isinstance(from_client(data), _MIGHTY)
        except ProtocolError:
            return True

    def _say(self, data: bytes) -> bool:
        try:
            if self._control is None:
                self._connect()
            self._control.sendall(data)
        except OSError:
            return False
        return True

    def _connect(self) -> None:
        self._name = os.urandom(16)
        self._lifeline = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lifeline.settimeout(allowed(DEADLINE))
        self._lifeline.connect(f"\0{self._address}/lifeline")
        self._lifeline.send(
            codec.encode(ClientHello(version=codec.PROTOCOL_VERSION, secret=self._secret, client=self._name))
        )
        self._lifeline.recv(4096)
        self._control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._control.settimeout(allowed(DEADLINE))
        self._control.connect(f"\0{self._address}/control")
        self._control.sendall(zmtp.GREETING + zmtp.ready(Socket_Type=b"DEALER", Identity=self._name))

    def _heard(self) -> None:
        """What was answered is read, sometimes."""
        if self._control is not None:
            self._control.setblocking(False)
            with contextlib.suppress(OSError):
                while self._control.recv(1 << 16):
                    pass
            self._control.settimeout(allowed(DEADLINE))

    def _hang_up(self) -> None:
        for sock in (self._control, self._lifeline):
            if sock is not None:
                sock.close()
        self._control = self._lifeline = None

    def _requests(self, mutator: Mutator, rng: random.Random) -> int:
        assert self._metrics is not None
        for _ in range(_TURN // 5):
            with (
                socket.create_connection(self._metrics, allowed(DEADLINE)) as sock,
                contextlib.suppress(OSError),
            ):
                sock.sendall(mutator.frame())
                sock.shutdown(socket.SHUT_WR)
                if rng.random() < 0.7:
                    while sock.recv(1 << 16):
                        pass
        return _TURN // 5

    def _caller(self, hello: bytes, address: str, mutator: Mutator, rng: random.Random) -> int:
        """A lane that was opened as it should be."""
        with contextlib.ExitStack() as stack:
            page, bell = segment.create(64), os.eventfd(0)
            ours, theirs = os.pipe()
            for fd in (page, bell, ours, theirs):
                stack.callback(os.close, fd)
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            sock.connect(f"\0{address}")
            socket.send_fds(sock, [hello], [page, bell, theirs])
            os.set_blocking(ours, False)
            sock.setblocking(False)
            for number in range(_TURN):
                self._post(sock, mutator.frame()[:PACKET], rng)
                os.eventfd_write(bell, rng.choice((1, 1, 1, 1, 2, 3, 7, 300)))
                if number % 5 == 0:
                    time.sleep(0.001)
                    with contextlib.suppress(OSError):
                        os.read(ours, 100)
                    _read_all(sock)
        return _TURN


def _read_all(sock: socket.socket) -> None:
    """What lies there, and the descriptors that come with it."""
    with contextlib.suppress(OSError):
        data = b"x"
        while data:
            data, fds, _, _ = socket.recv_fds(sock, 1 << 16, 64)
            for fd in fds:
                os.close(fd)


_REQUEST = b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:9464\r\nAccept: text/plain\r\nUser-Agent: x\r\n\r\n"


def _calls() -> list[bytes]:
    """Requests that come near to what the model takes."""
    x = lane.Tensor("<f4", (3,), 3, 64)
    inside = lane.Call(outputs=lane.Plain(None), feed=[("x", x)])
    return [
        codec.encode(lane.Envelope(shared=[(3, 4096)], message=msgspec.Raw(codec.encode(inside)))),
        codec.encode(inside),
        codec.encode(msgspec.structs.replace(inside, plan=1, moved=[0])),
        codec.encode(lane.Replay(plan=1, moved=[(0, x)])),
        codec.encode(lane.Invoke(method="get_inputs", args=[])),
        codec.encode(
            lane.Invoke(method="run", args=[lane.Plain(None), lane.Items("dict", [lane.Plain("x"), x])])
        ),
    ]
