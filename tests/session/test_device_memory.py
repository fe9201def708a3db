"""Memory on a GPU that an application binds: the host never touches it.

Against the stand-in for CUDA's driver, whose memory ends a process that touches it.  None of this ran on a
GPU.
"""

from __future__ import annotations

from pathlib import Path

from tests.support import fake_cuda
from tests.support.programs import program

GPU = """
from onnxruntime import OrtValue
from onnx_dl.ort import device_ortvalues
from tests.support.fake_cuda import FakeCuda
cuda = FakeCuda()
x, nbytes = np.arange(6, dtype=np.float32), 24

def on_gpu(array):
    address = cuda.allocate(array.nbytes)
    cuda.write(address, array.tobytes())
    return address

def floats(address, count=6):
    return np.frombuffer(cuda.read(address, 4 * count), np.float32).tolist()

def ortvalue(address, shape=(6,)):
    return OrtValue(device_ortvalues.over(1, shape, 0, address, None))

def refused(call, *args):
    try:
        call(*args)
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was refused")

binding = proxy.io_binding()
"""


def on_gpu(folder: Path, code: str, **variables: str) -> None:
    program(GPU + code, fake_cuda.environment(folder, **variables))


def test_memory_at_an_address_is_read_and_written_by_the_driver(folder: Path) -> None:
    on_gpu(
        folder,
        """
source, target = on_gpu(x), cuda.allocate(nbytes)
binding.bind_input("x", "cuda", 0, np.float32, [6], source)
binding.bind_output("y", "cuda", 0, np.float32, [6], target)
for factor in 1, 3:
    cuda.write(source, (x * factor).tobytes())
    proxy.run_with_iobinding(binding)
    assert floats(target) == (x * factor).tolist()
(value,) = binding.get_outputs()
assert (value.device_name(), value.data_ptr(), value.shape()) == ("cuda", target, [6])
(array,) = binding.copy_outputs_to_cpu()
assert (array == x * 3).all() and array.flags.writeable
assert cuda.misuses == cuda.depth == 0
""",
    )


def test_ortvalues_on_a_gpu(folder: Path) -> None:
    on_gpu(
        folder,
        """
target = cuda.allocate(nbytes)
binding.bind_ortvalue_input("x", ortvalue(on_gpu(x)))
binding.bind_ortvalue_output("y", ortvalue(target))
for _ in range(2):
    proxy.run_with_iobinding(binding)
    assert floats(target) == x.tolist()
assert binding.get_outputs()[0].data_ptr() == target
C = sys.modules["onnxruntime.capi.onnxruntime_pybind11_state"]
import onnxruntime
feeds, fetches = C.OrtValueVector(), C.OrtValueVector()
feeds.push_back(OrtValue.ortvalue_from_numpy(x + 1)._ortvalue)
fetches.push_back(ortvalue(target)._ortvalue)
proxy.run_with_ortvaluevector(onnxruntime.RunOptions(), ["x"], feeds, ["y"], fetches, [None])
assert floats(target) == (x + 1).tolist()
assert cuda.misuses == 0
""",
    )


def test_addresses_that_are_not_what_they_are_said_to_be(folder: Path) -> None:
    on_gpu(
        folder,
        """
source = on_gpu(x)
where = (np.float32, [6], source)
for bind, name in (binding.bind_input, "x"), (binding.bind_output, "y"):
    text = refused(bind, name, "cpu", 0, *where)
    assert 'device_type="cuda"' in text and hex(source) in text, text
    assert "does not know it" in refused(bind, name, "cuda", 0, np.float32, [6], x.ctypes.data)
    assert "beyond its allocation" in refused(bind, name, "cuda", 0, np.float32, [999], source)
    assert "not of 'dml'" in refused(bind, name, "dml", 0, *where)
binding.bind_input("x", "cpu", 0, np.float32, [6], x.ctypes.data)
binding.bind_output("y")
proxy.run_with_iobinding(binding)
assert (binding.copy_outputs_to_cpu()[0] == x).all()
assert cuda.misuses == 0
""",
    )


def test_a_result_for_a_gpu_stays_on_the_host_where_nothing_can_take_it(folder: Path) -> None:
    """The application has a context, but onnxruntime has no CUDA provider to allocate with."""
    on_gpu(
        folder,
        """
import onnxruntime
onnxruntime.set_default_logger_severity(4)  # it tells that the provider cannot be loaded
binding.bind_ortvalue_input("x", ortvalue(on_gpu(x)))
binding.bind_output("y", "cuda")
for _ in range(2):
    proxy.run_with_iobinding(binding)
    assert (binding.copy_outputs_to_cpu()[0] == x).all()
""",
    )


def test_no_context_is_made_for_a_program_that_has_none(folder: Path) -> None:
    program(
        """
import ctypes
from tests.support.fake_cuda import FakeCuda
cuda = FakeCuda(is_started=False)
binding = proxy.io_binding()
binding.bind_cpu_input("x", x)
binding.bind_output("y", "cuda")
for _ in range(2):
    proxy.run_with_iobinding(binding)
    assert (binding.copy_outputs_to_cpu()[0] == x).all()
try:
    binding.bind_input("x", "cuda", 0, np.float32, [1], 4096)
except ValueError as error:
    assert "no CUDA context" in str(error)
else:
    raise AssertionError("nothing was refused")
assert cuda.retained() == cuda.misuses == 0
""",
        fake_cuda.environment(folder),
    )
