"""Memory on a GPU that goes to a worker by handle, and results that come back so.

Against stand-ins for CUDA's driver and for a session with the CUDA provider.
``tests/gpu`` has what needs a GPU.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.session.test_device_memory import GPU
from tests.support import cuda_sessions, fake_cuda
from tests.support.programs import program

HEAD = (
    GPU
    + """
from sitecustomize import driver
import warnings
cuda = driver()
told = []
warnings.showwarning = lambda message, *_: told.append(str(message))
warnings.simplefilter("always")

def failures_of_threads(work):
    failed = []

    def caught():
        try:
            work()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=caught) for _ in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return failed
"""
)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def on_gpu(folder: Path, log: Path, code: str, **variables: str) -> list[fake_cuda.Call]:
    """What the processes called."""
    environment = fake_cuda.environment(folder, LOG=str(log), **variables)
    paths = [str(Path(cuda_sessions.__path__[0])), os.environ.get("PYTHONPATH", "")]
    program(HEAD + code, {**environment, "PYTHONPATH": os.pathsep.join([*paths, os.getcwd()])})
    return fake_cuda.calls(log)


def counted(calls: list[fake_cuda.Call]) -> dict[str, int]:
    found = [call.function for call in calls if not call.result]
    return {name: found.count(name) for name in found}


BOUND = """
source, target = on_gpu(x), cuda.allocate(nbytes)
binding.bind_input("x", "cuda", 0, np.float32, [6], source)
binding.bind_output("y", "cuda", 0, np.float32, [6], target)

def run(factor, binding=binding):
    cuda.write(source, (x * factor).tobytes())
    proxy.run_with_iobinding(binding)
    assert floats(target) == (x * factor).tolist()
"""
OPEN, CLOSE, SYNCHRONIZE = "cuIpcOpenMemHandle_v2", "cuIpcCloseMemHandle", "cuCtxSynchronize"
COPIES = {"cuMemcpyDtoH_v2", "cuMemcpyHtoD_v2"}


def test_an_allocation_is_opened_once_and_results_are_written_where_they_are_bound(
    folder: Path, log: Path
) -> None:
    calls = on_gpu(
        folder,
        log,
        BOUND
        + """
for factor in 1, 3, 5:
    run(factor)
assert binding.get_outputs()[0].data_ptr() == target
assert told == [] and cuda.misuses == cuda.open_handles == 0
""",
    )
    count = counted(calls)
    assert (count[OPEN], count.keys() & COPIES) == (2, set())
    opener = next(call.process for call in calls if call.function == OPEN)
    waits = [call.process == opener for call in calls if call.function == SYNCHRONIZE]
    assert waits == [False, True] * 3  # the application's before each request, the worker's before each reply


def test_a_result_that_a_run_allocates_becomes_an_ortvalue_of_the_application(
    folder: Path, log: Path
) -> None:
    calls = on_gpu(
        folder,
        log,
        """
binding.bind_ortvalue_input("x", ortvalue(source := on_gpu(x)))
binding.bind_output("y", "cuda")
proxy.run_with_iobinding(binding)
(value,) = binding.get_outputs()
assert value.device_name() == "cuda" and floats(value.data_ptr()) == x.tolist()
cuda.write(source, (x + 1).tobytes())
proxy.run_with_iobinding(binding)  # its memory is bound from then on
assert floats(value.data_ptr()) == (x + 1).tolist()
assert (binding.copy_outputs_to_cpu()[0] == x + 1).all()
assert told == [] and cuda.misuses == cuda.open_handles == 0
""",
    )
    assert counted(calls)["cuMemcpyDtoD_v2"] == 1


def test_ortvalues_of_a_run_without_a_binding_go_by_handle(folder: Path, log: Path) -> None:
    calls = on_gpu(
        folder,
        log,
        """
value = ortvalue(source := on_gpu(x))
for factor in 1, 3, 5:
    cuda.write(source, (x * factor).tobytes())
    (found,) = proxy.run_with_ort_values(None, {"x": value})
    assert found.device_name() == "cpu" and (found.numpy() == x * factor).all()
import onnxruntime
options = onnxruntime.RunOptions()
(found,) = proxy.run_with_ort_values(["y"], {"x": value}, options)
assert type(found) is OrtValue and (found.numpy() == x * 5).all()
assert told == [] and cuda.misuses == 0
""",
    )
    assert counted(calls)[OPEN] == 1


def test_vectors_of_ortvalues_go_by_handle(folder: Path, log: Path) -> None:
    calls = on_gpu(
        folder,
        log,
        """
import onnxruntime
C = sys.modules["onnxruntime.capi.onnxruntime_pybind11_state"]

def vector(*values):
    made = C.OrtValueVector()
    for value in values:
        made.push_back(value._ortvalue)
    return made

def ran(feed, fetches, device):
    device = onnxruntime.OrtDevice.make(device, 0)._get_c_device()
    proxy.run_with_ortvaluevector(onnxruntime.RunOptions(), ["x"], vector(feed), ["y"], fetches, [device])
    return fetches[0]

feed, target = ortvalue(on_gpu(x)), cuda.allocate(nbytes)
written = ran(feed, vector(ortvalue(target)), "cuda")
assert written.data_ptr() == target and floats(target) == x.tolist()
stays = ran(feed, vector(), "cuda")
assert stays.device_name() == "Cuda" and floats(stays.data_ptr()) == x.tolist()
comes = ran(feed, vector(), "cpu")
assert comes.device_name() == "Cpu" and comes.numpy().tolist() == x.tolist()
assert told == [] and cuda.misuses == 0
""",
    )
    assert counted(calls).keys() & COPIES == set()


@pytest.mark.parametrize("how", ["refuse", "refuse-open"])
def test_memory_without_a_handle_is_copied_and_that_is_told_once(folder: Path, log: Path, how: str) -> None:
    calls = on_gpu(
        folder,
        log,
        BOUND
        + """
for factor in 1, 3:
    run(factor)
other = proxy.io_binding()
other.bind_ortvalue_input("x", ortvalue(source))
other.bind_ortvalue_output("y", ortvalue(target))
run(5, other)
(text,) = told
assert text.startswith("Tensors on the GPU are copied through main memory, because "), text
assert cuda.misuses == 0
""",
        IPC=how,
    )
    assert counted(calls).keys() >= COPIES


@pytest.mark.parametrize(
    ("variable", "reason"),
    [("FAKE_CUDA_UUID", "does not have the GPU"), ("CUDA_VISIBLE_DEVICES", "uses no GPU")],
)
def test_a_worker_without_the_gpu_of_the_tensors_gets_copies(
    folder: Path, log: Path, variable: str, reason: str
) -> None:
    on_gpu(
        folder,
        log,
        f"""
variables = {{{variable!r}: "another"}}
there = InferenceSessionProxy(identity_model(), providers=["CPUExecutionProvider"], environment=variables)
binding = there.io_binding()
binding.bind_ortvalue_input("x", ortvalue(on_gpu(x)))
binding.bind_ortvalue_output("y", ortvalue(target := cuda.allocate(nbytes)))
for _ in range(2):
    there.run_with_iobinding(binding)
    assert floats(target) == x.tolist()
(text,) = told
assert {reason!r} in text, text
""",
    )


def test_handles_are_closed_when_nothing_names_them(folder: Path, log: Path) -> None:
    calls = on_gpu(
        folder,
        log,
        BOUND
        + f"""
from pathlib import Path
from tests.support.fake_cuda import calls
from tests.support.waiting import eventually
closed = lambda: [call.result for call in calls(Path({str(log)!r})) if call.function == {CLOSE!r}]
run(1)
binding.bind_ortvalue_input("x", ortvalue(on_gpu(x)))
proxy.run_with_iobinding(binding)
assert closed() == [0]  # the first input
binding.clear_binding_inputs()
binding.clear_binding_outputs()
proxy.run(None, {{"x": x}})
assert closed() == [0, 0, 0]
binding.bind_ortvalue_input("x", ortvalue(source))
binding.bind_output("y")
proxy.run_with_iobinding(binding)
binding.clear_binding_inputs()
eventually(lambda: len(closed()) == 4, "the handle of an idle lane is closed")
assert told == [] and cuda.misuses == 0
""",
    )
    count = counted(calls)
    assert count[OPEN] == count[CLOSE] == 4


def test_a_worker_that_was_killed_is_replaced_and_opens_the_memory_again(folder: Path, log: Path) -> None:
    calls = on_gpu(
        folder,
        log,
        BOUND
        + """
run(1)
from tests.support.waiting import worker_pid
os.kill(worker_pid(default_host()), signal.SIGKILL)
try:
    run(2)
except Exception as error:
    assert type(error).__name__ == "WorkerDied", error
run(3)
assert told == [] and cuda.misuses == 0
""",
    )
    assert counted(calls)[OPEN] == 4


def test_threads_with_bindings_of_the_same_memory(folder: Path, log: Path) -> None:
    on_gpu(
        folder,
        log,
        """
source = on_gpu(x)

def work():
    mine, target = proxy.io_binding(), cuda.allocate(nbytes)
    mine.bind_ortvalue_input("x", ortvalue(source))
    mine.bind_ortvalue_output("y", ortvalue(target))
    for _ in range(20):
        cuda.write(target, bytes(nbytes))
        proxy.run_with_iobinding(mine)
        assert floats(target) == x.tolist()

assert failures_of_threads(work) == told == [] and cuda.misuses == 0
""",
    )


def test_a_run_that_repeats_sees_new_inputs_and_new_memory(folder: Path, log: Path) -> None:
    """A number stands for what is bound, which is bound anew if memory, shapes or the worker changed."""
    on_gpu(
        folder,
        log,
        BOUND
        + """
import onnxruntime
for factor in range(4):
    run(factor)
other = proxy.io_binding()
other.bind_ortvalue_input("x", ortvalue(source, (3,)))
other.bind_ortvalue_output("y", ortvalue(mine := cuda.allocate(12), (3,)))
for factor in range(1, 4):  # by turns on one lane, which has to open what the other one did not name
    run(factor)
    proxy.run_with_iobinding(other)
    assert floats(mine, 3) == (x[:3] * factor).tolist()
old = mine
other.bind_ortvalue_output("y", ortvalue(mine := cuda.allocate(12), (3,)))
proxy.run_with_iobinding(other)
cuda.free(old)
assert floats(mine, 3) == (x[:3] * 3).tolist()
proxy.unload()
run(5)
binding.bind_input("x", "cuda", 0, np.int32, [6], source)
try:
    proxy.run_with_iobinding(binding)
except Exception as error:
    assert "Unexpected input data type" in str(error), error
else:
    raise AssertionError("integers were taken for numbers")
binding.bind_input("x", "cuda", 0, np.float32, [6], source)
run(6)
stopped = onnxruntime.RunOptions()
stopped.terminate = True
try:
    proxy.run_with_iobinding(binding, stopped)
except Exception as error:
    assert "terminate" in str(error), error
run(7)
assert told == [] and cuda.misuses == 0
""",
    )


def test_memory_that_is_gone_is_an_error_and_not_a_crash(folder: Path, log: Path) -> None:
    on_gpu(
        folder,
        log,
        BOUND
        + """
run(1)
cuda.free(target)
assert "does not know it" in refused(proxy.run_with_iobinding, binding)
""",
    )
