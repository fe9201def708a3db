"""Where /proc, /sys and /dev are not mounted, as in a bare chroot: what works, and what says why not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Final

import pytest

pytestmark = pytest.mark.slow

_EMPTY: Final = 'for name in {}; do mount -t tmpfs none /$name || exit 77; done; exec "$@"'
HEAD: Final = """
import os, sys
import numpy as np
from onnx_dl import InferenceSessionProxy, ModelHost, OnnxDLError
from tests.support.slow import identity_model
x = np.arange(1 << 18, dtype=np.float32)
def opened(host, **more):
    return InferenceSessionProxy(identity_model(), providers=["CPUExecutionProvider"], host=host, **more)
"""


def without(folders: str, code: str) -> subprocess.CompletedProcess[str]:
    """Runs a program that finds these folders empty; its own mounts are seen by nobody else."""
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare(1)")
    root = [] if os.getuid() == 0 else ["--map-root-user"]
    argv = ["unshare", *root, "--mount", "--propagation", "private", "sh", "-c", _EMPTY.format(folders), "sh"]
    done = subprocess.run(
        [*argv, sys.executable, "-c", HEAD + code], capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode == 77 or done.stderr.startswith("unshare:"):
        pytest.skip(f"no mounts of one's own: {done.stderr.strip()}")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize("folders", ["proc", "proc sys dev"])
@pytest.mark.parametrize("lane", ["socket", "zmq"])
def test_models_work(monkeypatch: pytest.MonkeyPatch, folders: str, lane: str) -> None:
    monkeypatch.setenv("ONNX_DL_LANE", lane)
    without(
        folders,
        """
assert not os.path.exists("/proc/self")
with ModelHost() as host:
    proxy = opened(host)
    for _ in range(5):
        assert (proxy.run(None, {"x": x})[0] == x).all()
    (status,) = host.snapshot().models
    assert status.usage.pss == 0  # nobody tells
    proxy.unload()
    assert (proxy.run(None, {"x": x})[0] == x).all()
""",
    )


def test_limits_of_memory_say_what_they_need() -> None:
    done = without(
        "proc",
        """
LIMIT = "1GB"
tried = [({"memory_limit": LIMIT}, {}), ({}, {"max_memory": LIMIT}), ({}, {"max_memory_hard": LIMIT})]
for host, proxy in tried:
    with ModelHost(**host) as host:
        try:
            opened(host, **proxy).run(None, {"x": x})
        except OnnxDLError as error:
            print(error)
""",
    )
    said = done.stdout.splitlines()
    assert len(said) == 3 and said[0].startswith("memory_limit") and said[1] == said[2]
    assert all("mount -t proc" in line for line in said) and "max_memory_hard" in said[1]
