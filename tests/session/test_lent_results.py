"""Results that a run allocates on a GPU and that the application cannot open: the model does not run again.

Against stand-ins for CUDA's driver and for a session with the CUDA provider.
``tests/gpu`` has what needs a GPU.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest

from onnx_dl import InferenceSessionProxy, ModelHost
from onnx_dl.errors import ProtocolError
from tests.session.test_device_handles import OPEN, counted, log, on_gpu
from tests.support import zoo
from tests.support.waiting import DEADLINE

__all__ = ["log"]

RANDOM = """
import onnxruntime
from tests.support import zoo
ends = [zoo.tensor("x", zoo.F, ["n"])], [zoo.tensor("y", zoo.F, ["n"])]
model = zoo._bytes([zoo.node("RandomUniformLike", ["x"], ["y"], seed=7.0)], *ends)
expected = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
proxy = InferenceSessionProxy(model, providers=["CPUExecutionProvider"], max_runs=MOST)

def bound():
    made = proxy.io_binding()
    made.bind_ortvalue_input("x", ortvalue(on_gpu(x)))
    made.bind_output("y", "cuda")
    return made

def next_result():
    return expected.run(None, {"x": x})[0].tolist()

def on_host(binding):
    return binding.copy_outputs_to_cpu()[0].tolist()
"""


@pytest.mark.parametrize("most_runs", ["None", "1"])
def test_a_result_that_cannot_be_opened_comes_by_value(folder: Path, log: Path, most_runs: str) -> None:
    """Also from a worker that would end after its run: the call is in flight until its caller has it."""
    calls = on_gpu(
        folder,
        log,
        RANDOM.replace("MOST", most_runs)
        + f"""
binding = bound()
proxy.load()
os.environ["FAKE_CUDA_IPC"] = "refuse-open"  # in this process, not in the worker
proxy.run_with_iobinding(binding)
assert on_host(binding) == next_result()
(text,) = told
assert text.startswith("Tensors on the GPU are copied through main memory, because "), text
if {most_runs} != 1:
    proxy.run_with_iobinding(binding)
    assert on_host(binding) == next_result()
(model,) = default_host().snapshot().models
assert model.loads == 1 and cuda.misuses == 0
""",
    )
    assert counted(calls)["cuMemcpyDtoH_v2"] >= 1


def test_a_worker_that_dies_before_its_result_is_read_is_an_error(folder: Path, log: Path) -> None:
    calls = on_gpu(
        folder,
        log,
        RANDOM.replace("MOST", "None")
        + """
from onnx_dl.system.cuda_driver import CudaDriver, DriverError
from tests.support.waiting import worker_pid
opened = CudaDriver.open

def die(self, *args):
    os.kill(worker_pid(default_host()), signal.SIGKILL)
    raise DriverError(201, "cuIpcOpenMemHandle_v2", "CUDA_ERROR_INVALID_CONTEXT")

CudaDriver.open = die
binding = bound()
try:
    proxy.run_with_iobinding(binding)
except Exception as error:
    assert type(error).__name__ == "WorkerDied", error
else:
    raise AssertionError("a result came from a worker that was killed")
CudaDriver.open = opened
proxy.run_with_iobinding(binding)
assert on_host(binding) == next_result() and told == []
""",
    )
    assert counted(calls)[OPEN] == 3  # two inputs and a result


UNASKED = """
import time
from onnx_dl.ort.ortvalues import Parts
from onnx_dl.protocol.lane import Plain
from onnx_dl.transport.worker_lane import WorkerLane
from onnx_dl.workers.lane_service import LaneService

reply = WorkerLane.reply

def lend(self, value, *, keep=False):
    if type(value) is list:
        value = [Parts("device", [Plain([1, [4], b"u" * 16, 1, "ipc", b"h" * 64, 0, 16, 16])])]
    return reply(self, value, keep=keep)

WorkerLane.reply = lend
LaneService._refuse_taken = lambda self, _: time.sleep(1000)
"""


def test_a_loan_that_no_call_asked_for_keeps_no_event_loop_waiting(host: ModelHost, tmp_path: Path) -> None:
    """A worker that misbehaves does not answer what ends the loan."""
    (tmp_path / "sitecustomize.py").write_text(UNASKED)
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    proxy = InferenceSessionProxy(zoo.plus(1.0), host=host, environment={"PYTHONPATH": paths})
    feed = {"x": np.zeros(2, np.float32)}
    with pytest.raises(ProtocolError, match="lent memory on a GPU to a call that takes none"):
        proxy.run(None, feed)
    with pytest.raises(ProtocolError, match="lent memory on a GPU to a call that takes none"):
        asyncio.run(asyncio.wait_for(proxy.arun(None, feed), DEADLINE))
