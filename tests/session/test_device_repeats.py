"""Runs with everything on a GPU that are made again: by a number, for as long as nothing has changed.

Against stand-ins for CUDA's driver and for a session with the CUDA provider.
``tests/gpu`` has what needs a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.session.test_device_handles import BOUND, OPEN, counted, on_gpu

REPEATS = (
    BOUND
    + """
from onnx_dl.client.remote_model import RemoteModel
messages, invoke = [], RemoteModel.invoke
RemoteModel.invoke = lambda self, *args, **named: messages.append(args[1]) or invoke(self, *args, **named)

def repeat(times, expected):
    del messages[:]
    for factor in range(times):
        run(factor)
    assert len(messages) == expected, messages

run(1)
repeat(3, 0)
"""
)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def test_an_allocation_that_came_to_the_address_of_another_is_noticed(folder: Path, log: Path) -> None:
    calls = on_gpu(
        folder,
        log,
        REPEATS
        + """
cuda.free(source)
assert cuda.allocate(nbytes) == source, "the test needs another allocation at the same address"
repeat(3, 1)
assert told == []
""",
    )
    assert counted(calls)[OPEN] == 3


def test_the_worker_is_told_again_what_it_has_closed(folder: Path, log: Path) -> None:
    calls = on_gpu(
        folder,
        log,
        REPEATS
        + """
proxy.run(None, {"x": x})
repeat(3, 1)  # the number alone is not known any more
binding.bind_output("y", "cuda", 0, np.float32, [6], target)
repeat(3, 0)  # to the same as before
proxy.unload()
repeat(3, 1)
assert told == [] and cuda.misuses == 0
""",
    )
    assert counted(calls)[OPEN] == 6


def test_a_context_that_the_application_has_reset(folder: Path, log: Path) -> None:
    on_gpu(
        folder,
        log,
        REPEATS
        + """
from onnx_dl.system.cuda_types import DriverError
cuda.reset()
try:
    proxy.run_with_iobinding(binding)
except DriverError as error:
    assert "CUDA_ERROR_INVALID_CONTEXT" in str(error)
else:
    raise AssertionError("a run was made without a context")
cuda.activate(0)
repeat(3, 0)
assert told == [] and cuda.misuses == cuda.depth == 0
""",
    )


def test_a_forked_child_has_no_context(folder: Path, log: Path) -> None:
    on_gpu(
        folder,
        log,
        REPEATS
        + """
if (child := os.fork()) == 0:
    os._exit("no CUDA context" not in refused(proxy.run_with_iobinding, binding))
assert os.waitpid(child, 0)[1] == 0
repeat(3, 0)
assert told == [] and cuda.misuses == cuda.depth == 0
""",
    )


def test_threads_share_a_binding(folder: Path, log: Path) -> None:
    on_gpu(
        folder,
        log,
        REPEATS
        + """
def work():
    for _ in range(50):
        proxy.run_with_iobinding(binding)

assert failures_of_threads(work) == told == [] and floats(target) == (x * 2).tolist() and cuda.misuses == 0
""",
    )
