"""Models that capture CUDA graphs, which use the addresses of one run again.

Against stand-ins for CUDA's driver and for a session that captures graphs.
``tests/gpu`` has what needs a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.session.test_device_handles import BOUND, CLOSE, OPEN, counted, log, on_gpu
from tests.support.sharing import own_runtime

__all__ = ["log"]

OTHER = """
def another(shape=(6,)):
    made, mine, goal = proxy.io_binding(), on_gpu(x[:shape[0]]), cuda.allocate(4 * shape[0])
    made.bind_input("x", "cuda", 0, np.float32, shape, mine)
    made.bind_output("y", "cuda", 0, np.float32, shape, goal)

    def run_it(factor):
        cuda.write(mine, (x[:shape[0]] * factor).tobytes())
        proxy.run_with_iobinding(made)
        assert floats(goal, shape[0]) == (x[:shape[0]] * factor).tolist()

    return run_it
"""


def test_each_binding_gets_its_own_results(folder: Path, log: Path) -> None:
    """With one number for all, the second one would have its results in the memory of the first."""
    on_gpu(
        folder,
        log,
        BOUND
        + OTHER
        + """
import onnxruntime
for factor in range(3):
    run(factor)
others = [another(), another((3,))]
for factor in range(3):
    for run_it in others:
        run_it(factor)
    run(factor + 5)
    assert (proxy.run(None, {"x": x + factor})[0] == x + factor).all()
options = onnxruntime.RunOptions()
options.add_run_config_entry("gpu_graph_id", "1")
cuda.write(target, bytes(nbytes))
proxy.run_with_iobinding(binding, options)
assert floats(target) == (x * 7).tolist()
proxy.release_captured_graph(1)
assert told == [] and cuda.misuses == 0
""",
        GRAPHS="1",
    )


def test_threads_take_turns(folder: Path, log: Path) -> None:
    on_gpu(
        folder,
        log,
        OTHER
        + """
def work():
    run_it = another()
    for factor in range(20):
        run_it(factor)
        proxy.run(None, {"x": x})

assert failures_of_threads(work) == told == [] and cuda.misuses == 0
""",
        GRAPHS="1",
    )


def test_memory_of_an_application_that_is_gone_is_closed(
    folder: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its graph is not replayed for another application."""
    monkeypatch.setenv("ONNX_DL_HOST", "default")
    with own_runtime(monkeypatch):
        calls = on_gpu(
            folder,
            log,
            BOUND
            + OTHER
            + f"""
import subprocess
from pathlib import Path
from tests.support.fake_cuda import calls
from tests.support.programs import HEAD
from tests.session.test_device_handles import BOUND
from tests.session import test_device_handles
from tests.support.waiting import eventually
closed = lambda: [call.result for call in calls(Path({str(log)!r})) if call.function == {CLOSE!r}]
run(1)
code = HEAD + test_device_handles.HEAD + BOUND + "for factor in 2, 3: run(factor)"
done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
assert (done.returncode, done.stderr) == (0, ""), done.stderr
eventually(lambda: closed() == [0, 0], "the worker closes what the other application had lent")
another()(2)
run(4)
assert default_host().snapshot().models[0].loads == 1
assert told == [] and cuda.misuses == 0
""",
            GRAPHS="1",
        )
    assert counted(calls)[OPEN] == 6
