"""A failure ends what it concerns: hostile packets, too few descriptors, a template that is stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from onnx_dl import InferenceSessionProxy, ModelHost, WorkerDied
from onnx_dl.demo.assets import model_path
from onnx_dl.protocol import codec
from onnx_dl.protocol.control import Blob, ClientHello, Welcome
from onnx_dl.protocol.lane import LaneHello, Trim
from onnx_dl.transport import zmtp
from tests.support.small import plus
from tests.support.waiting import DEADLINE, allowed, eventually, template_of, worker_pid

pytestmark = pytest.mark.slow

FEED = {"pixels": np.zeros((1, 64), np.float32)}
ODD_SECRET = "ä" * 16


def addresses(host: ModelHost, role: str) -> Iterator[str]:
    """Where the processes of a host listen."""
    pids = {host.snapshot().supervisor_pid, *(s.pid for s in host.snapshot().models)}
    names = {
        name.rpartition("@")[2]
        for pid in pids
        for name in _sockets(pid or 0)
        if name.startswith("@") and f"/{role}/" in name
    }
    yield from sorted(names)


def _sockets(pid: int) -> list[str]:
    inodes = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(f"/proc/{pid}/fd/{fd}").removeprefix("socket:[").removesuffix("]"))
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return [row[7] for row in rows if len(row) > 7 and row[6] in inodes]


def packets(address: str, kind: int, *messages: bytes, fds: tuple[int, ...] = ()) -> socket.socket:
    """A connection on which this was said."""
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.settimeout(allowed(DEADLINE))
    sock.connect(f"\0{address}")
    for message in messages:
        with contextlib.suppress(ConnectionError):  # it was enough already
            socket.send_fds(sock, [message], list(fds)) if fds else sock.send(message)
    return sock


def hello(**fields: object) -> bytes:
    known = {"version": codec.PROTOCOL_VERSION, "secret": ODD_SECRET, "client": b"odd"} | fields
    return codec.encode(ClientHello(**known))


LIFELINE = {
    "nonsense": b"nonsense",
    "a secret that is not ASCII": hello(),
    "a secret of surrogates": hello().replace(ODD_SECRET.encode(), b"\xed\xa0\x80" * 10 + b"ab"),
    "another message": codec.encode(Blob(number=1, name="x")),
    "a message of the other side": codec.encode(Welcome()),
    "deep": b"\x91" * 60_000,
    "a large number": hello(version=2**63),
    "an empty packet": b"",
    "no secret": hello(secret=""),
}
LANE = {
    "nonsense": b"nonsense",
    "a secret that is not ASCII": codec.encode(LaneHello(version=codec.PROTOCOL_VERSION, secret=ODD_SECRET)),
    "a message of a lane": codec.encode(Trim()),
    "deep": b"\x91" * 60_000,
}


@pytest.fixture
def digits(host: ModelHost) -> InferenceSessionProxy:
    proxy = InferenceSessionProxy(model_path("digits"), host=host)
    proxy.run(None, FEED)
    return proxy


def unharmed(host: ModelHost, proxy: InferenceSessionProxy, supervisor: int | None, worker: int) -> None:
    proxy.run(None, FEED)
    assert host.snapshot().supervisor_pid == supervisor
    assert worker_pid(host) == worker
    other = InferenceSessionProxy(model_path("diabetes"), host=host)
    other.load()
    other.close()
    eventually(lambda: len(host.snapshot().models) == 1, "the other is unloaded")


def test_hostile_packets_end_nothing_but_their_connection(
    digits: InferenceSessionProxy, host: ModelHost
) -> None:
    supervisor, worker = host.snapshot().supervisor_pid, worker_pid(host)
    lifeline = next(address for address in addresses(host, "host") if address.endswith("lifeline"))
    control = next(address for address in addresses(host, "host") if address.endswith("control"))
    (lane,) = addresses(host, "worker")
    with contextlib.ExitStack() as stack, open(os.devnull) as null:
        for address, said in ((lifeline, LIFELINE), (lane, LANE)):
            for data in said.values():
                for fds in ((), (null.fileno(),), (null.fileno(),) * 2, (null.fileno(),) * 100):
                    sock = packets(address, socket.SOCK_SEQPACKET, data, data, fds=fds)
                    stack.callback(sock.close)
        greeting = zmtp.GREETING + zmtp.ready(Socket_Type=b"DEALER", Identity=b"odd")
        for data in (b"nonsense" * 20, greeting + zmtp.frame(b"nonsense"), greeting[:70], bytes(1 << 16)):
            stack.callback(packets(control, socket.SOCK_STREAM, data).close)
        unharmed(host, digits, supervisor, worker)
    eventually(lambda: len(_sockets(supervisor or 0)) < 30, "their connections are closed")


def test_connections_that_say_nothing(digits: InferenceSessionProxy, host: ModelHost) -> None:
    """Of one process, sixteen at most for longer than a moment."""
    supervisor, worker = host.snapshot().supervisor_pid, worker_pid(host)
    before = len(os.listdir(f"/proc/{supervisor}/fd")), len(os.listdir(f"/proc/{worker}/fd"))
    with contextlib.ExitStack() as stack:
        for address in [*addresses(host, "host"), *addresses(host, "worker")]:
            kind = socket.SOCK_STREAM if address.endswith("control") else socket.SOCK_SEQPACKET
            for _ in range(60):
                stack.callback(packets(address, kind).close)
        unharmed(host, digits, supervisor, worker)

        def few_are_left() -> bool:
            after = len(os.listdir(f"/proc/{supervisor}/fd")), len(os.listdir(f"/proc/{worker}/fd"))
            return after[0] <= before[0] + 32 and after[1] <= before[1] + 16

        eventually(few_are_left, "no more than sixteen on each socket")
        unharmed(host, digits, supervisor, worker)


def test_a_stopped_template_and_a_stopped_worker_keep_nothing_alive(
    digits: InferenceSessionProxy, host: ModelHost
) -> None:
    supervisor = host.snapshot().supervisor_pid or 0
    ours = [psutil.Process(supervisor), template_of(host), psutil.Process(worker_pid(host))]
    for process in ours[1:]:
        process.suspend()
    host.close()
    assert not [process for process in ours if process.is_running()]


def test_templates_that_die_while_models_are_asked_for(host: ModelHost) -> None:
    """At whatever moment: each load works, or says that its template died."""
    host.start()
    for turn in range(6):
        proxies = [InferenceSessionProxy(plus(turn * 8 + i), host=host) for i in range(3)]
        template = template_of(host)
        results = []
        for i, proxy in enumerate(proxies):
            if i == 1:
                template.send_signal(signal.SIGKILL)
            try:
                proxy.load()
                results.append("loaded")
            except WorkerDied as error:
                assert "the template process ended" in str(error)
                results.append("died")
        assert results[0] == "loaded" and results.count("died") <= 1
        for proxy in proxies:
            proxy.close()


FEW = """
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
    import numpy as np, onnx_dl, time
    from tests.support.small import plus
    x = np.ones(1, np.float32)
    resource.setrlimit(resource.RLIMIT_NOFILE, ({hard}, {hard}))  # the application itself has enough
    host = onnx_dl.default_host()
    proxies, refused = [], []
    while not refused and len(proxies) < {most}:
        proxy = onnx_dl.InferenceSessionProxy(plus(len(proxies)), providers=["CPUExecutionProvider"])
        try:
            proxy.load()
            proxies.append(proxy)
        except onnx_dl.DescriptorsExhausted as error:
            refused.append(error)
    supervisor = host.snapshot().supervisor_pid
    for i, proxy in enumerate(proxies):
        assert proxy.run(None, {{"x": x}})[0][0] == i + 1
    print(len(proxies), len(refused))
    for proxy in proxies[:2]:
        proxy.close()  # and there is room for another
    if refused:
        assert "it may have {hard}" in str(refused[0]) and refused[0].errno == 24, refused
        again = onnx_dl.InferenceSessionProxy(plus(500), providers=["CPUExecutionProvider"])
        deadline = time.monotonic() + 60
        while True:  # what is closed is gone a moment later
            try:
                again.load()
                break
            except onnx_dl.DescriptorsExhausted:
                assert time.monotonic() < deadline
    assert host.snapshot().supervisor_pid == supervisor
"""


def ran(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_soft_limit_of_descriptors_is_raised() -> None:
    assert ran(FEW.format(soft=48, hard=1024, most=10)) == ["10", "0"]


def test_more_models_than_descriptors() -> None:
    """The one that finds none is told so, all others go on, and room that is given back is used."""
    loaded, refused = map(int, ran(FEW.format(soft=64, hard=64, most=40)))
    assert loaded >= 3 and refused == 1
