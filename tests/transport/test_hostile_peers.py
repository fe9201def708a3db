"""A peer with all secrets that says what it likes, on every socket of a host, while somebody works with it.

And one of another user, who gets nowhere.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from onnx_dl import InferenceSessionProxy, ModelHost
from onnx_dl.tensors import segment
from tests.fuzz import live
from tests.supervisor.test_boundaries import addresses
from tests.support.slow import identity_model

NOBODY = 65534
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_what_a_hostile_peer_says_ends_its_own_connections_only() -> None:
    live.feed(4_000, seed=1)


# --- another user ------------------------------------------------------------------------------------------

CONNECT = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for kind, address in zip(sys.argv[1::2], sys.argv[2::2]):
    sock = socket.socket(socket.AF_UNIX, int(kind))
    sock.settimeout(8)
    try:
        sock.connect("\\0" + address)
        said = b"x"
        while said:  # until it is closed; what comes before says nothing of anybody
            said = sock.recv(4096)
    except ConnectionError:
        pass
    print("closed")
"""

OPEN = """
import os, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for path in sys.argv[1:]:
    try:
        os.open(path, os.O_RDWR)
    except OSError as error:
        print(type(error).__name__)
    else:
        print("opened")
"""


def as_nobody(script: str, *arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@needs_root
def test_another_user_cannot_connect(host: ModelHost) -> None:
    proxy = InferenceSessionProxy(identity_model(), providers=["CPUExecutionProvider"], host=host)
    x = np.arange(4, dtype=np.float32)
    proxy.run(None, {"x": x})
    kinds = {"control": socket.SOCK_STREAM}
    found = [*addresses(host, "host"), *addresses(host, "worker")]
    assert len(found) == 3
    told = [
        word for address in found
        for word in (str(int(kinds.get(address.rpartition("/")[2], socket.SOCK_SEQPACKET))), address)
    ]  # fmt: skip
    assert as_nobody(CONNECT, *told) == ["closed"] * 3
    assert np.array_equal(proxy.run(None, {"x": x})[0], x)


def named() -> set[str]:
    """Shared memory that has a name which Python or we would give it: other programs' comes and goes."""
    return {name for name in os.listdir("/dev/shm") if "onnx" in name or "psm_" in name}


@needs_root
def test_another_user_cannot_map_what_tensors_lie_in(host: ModelHost) -> None:
    proxy = InferenceSessionProxy(identity_model(), providers=["CPUExecutionProvider"], host=host)
    before = named()
    (y,) = proxy.run(None, {"x": np.zeros(1 << 18, np.float32)})
    own = segment.create(4096)
    paths = [f"/proc/{os.getpid()}/fd/{own}"]
    for pid in (os.getpid(), *(model.pid for model in host.snapshot().models)):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            path = f"/proc/{pid}/fd/{fd}"
            if os.path.exists(path) or os.path.islink(path):
                paths += [path] if "memfd:" in os.readlink(path) else []
    assert len(paths) > 1
    assert set(as_nobody(OPEN, *paths)) == {"PermissionError"}
    assert named() <= before, "nothing has a name"
    os.close(own)
    assert not y.any()
