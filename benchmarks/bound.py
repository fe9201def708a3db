"""A tiny call by IOBinding, with everything in memory of a GPU, and with everything in main memory.

**Not on a GPU**: the driver is a stand-in in C, whose "device" is memory of the host, and the session runs on
the CPU over it (``tests/support``).  So this measures what onnx-dl itself does for such a call, in Python and
between processes.  It says nothing about a GPU, whose driver takes longer.  In a process of its own, in which
all that uses CUDA gets the stand-in.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from tests.support import cuda_sessions, fake_cuda

from benchmarks.calls import OURS, make_session, proxy_of
from benchmarks.models import Case, cases
from benchmarks.report import ADDED, Row
from benchmarks.timing import BASE, Times, Way, figure
from onnx_dl import ModelHost

ON_DEVICE: Final = "tiny Add, all on a stand-in for a GPU"
ON_HOST: Final = "tiny Add, bound in main memory"
RUN, ANEW = "onnx-dl, run()", "onnx-dl, bound before each run"
_FLOAT: Final = 1
_ROOT: Final = Path(__file__).parents[1]


def measure(rounds: int) -> list[Row]:
    if shutil.which("cc") is None:
        return [Row(ON_DEVICE, OURS, None, note="there is no C compiler (cc) to make the stand-in with")]
    with tempfile.TemporaryDirectory() as folder:
        fake_cuda.build(Path(folder))
        paths = [*cuda_sessions.__path__, *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.bound", str(rounds)],
            cwd=_ROOT,
            env=fake_cuda.environment(Path(folder)) | {"PYTHONPATH": os.pathsep.join([*paths, str(_ROOT)])},
            stdout=subprocess.PIPE,
            check=True,
        )
    return [Row(*row) for row in json.loads(done.stdout)]


# --- in the process of its own ---------------------------------------------------------------------------


def _rows(rounds: int) -> list[Row]:
    case = cases()["tiny"]
    with contextlib.ExitStack() as stack:
        session = make_session(case.model, case.threads)
        proxy = stack.enter_context(
            proxy_of(case.model, stack.enter_context(ModelHost()), threads=case.threads)
        )
        device = Times(
            [
                Way(BASE, _on_device(session, case)),
                Way(OURS, _on_device(proxy, case)),
                Way(RUN, lambda: proxy.run(None, case.feed)),
            ],
            case.calls,
            rounds,
        )
        host = Times(
            [
                Way(BASE, _on_host(session, case)),
                Way(OURS, _on_host(proxy, case)),
                Way(ANEW, _on_host(proxy, case, anew=True)),
            ],
            case.calls,
            rounds,
        )
    found = []
    for work, times in ((ON_DEVICE, device), (ON_HOST, host)):
        found.append(figure(work, BASE, times.by_round(BASE), "µs", p99=times.p99(BASE)))
        found += [figure(work, w, times.added(w), ADDED, p99=times.p99(w)) for w in times.names[1:]]
    return found


def _on_device(session: Any, case: Case) -> Callable[[], None]:
    from sitecustomize import driver  # that of the stand-in

    cuda, x = driver(), case.feed["x"]
    source, target = cuda.allocate(x.nbytes), cuda.allocate(x.nbytes)
    cuda.write(source, x.tobytes())
    binding = session.io_binding()
    binding.bind_input("x", "cuda", 0, _FLOAT, x.shape, source)
    binding.bind_output("y", "cuda", 0, _FLOAT, x.shape, target)

    def call() -> None:
        session.run_with_iobinding(binding)

    call()
    (expected,) = session.run(None, case.feed)
    if cuda.read(target, x.nbytes) != expected.tobytes():
        raise AssertionError("a binding computes something else")
    return call


def _on_host(session: Any, case: Case, *, anew: bool = False) -> Callable[[], None]:
    x = case.feed["x"]
    y = np.empty_like(x)
    binding = session.io_binding()

    def bind() -> None:
        binding.bind_input("x", "cpu", 0, _FLOAT, x.shape, x.ctypes.data)
        binding.bind_output("y", "cpu", 0, _FLOAT, x.shape, y.ctypes.data)

    def call() -> None:
        if anew:
            bind()
        session.run_with_iobinding(binding)

    bind()
    call()
    if not np.array_equal(y, session.run(None, case.feed)[0]):
        raise AssertionError("a binding computes something else")
    return call


if __name__ == "__main__":
    print(json.dumps(_rows(int(sys.argv[1]))))
