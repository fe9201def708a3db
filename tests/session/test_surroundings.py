"""What is set for the whole process, and what is recorded, reaches workers.

In processes of their own, because it cannot be taken back.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HEAD = """
import sys
{first}
from onnx_dl import ConfigError, InferenceSessionProxy, ModelHost
from tests.contract.both import *
import numpy as np, onnxruntime, warnings
native = onnxruntime.capi.onnxruntime_pybind11_state
def random():
    return model([node("RandomNormal", [], ["y"], shape=[4])], [], [tensor("y", F, [4])])
"""


def ran(code: str, cwd: Path, first: str = "") -> str:
    """Standard output of a script, which wrote nothing to standard error."""
    script = HEAD.format(first=first) + code
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "first", ["import onnx_dl", "import onnxruntime", "from onnxruntime import set_seed"]
)
def test_the_seed(tmp_path: Path, first: str) -> None:
    code = """
from onnx_dl import InferenceSessionProxy
onnxruntime.set_seed(7)
if "set_seed" in globals():
    set_seed(8)
real = onnxruntime.InferenceSession(random(), providers=CPU).run(None, {})[0]
with ModelHost() as host:
    proxy = InferenceSessionProxy(random(), providers=CPU, host=host).run(None, {})[0]
print(real.tobytes() == proxy.tobytes())
"""
    assert ran(code, tmp_path, first) == "True\n"


def test_threads_of_the_process(tmp_path: Path) -> None:
    code = """
onnxruntime.set_global_thread_pool_sizes(2, 1)
options = onnxruntime.SessionOptions()
options.use_per_session_threads = False
with ModelHost() as host:
    proxy = InferenceSessionProxy(scaled(), options, CPU, host=host)
    print(proxy.run(["twice"], {"x": np.ones((1, 1), np.float32)})[0][0, 0])
"""
    assert ran(code, tmp_path) == "2.0\n"


def test_threads_of_the_process_that_were_not_set(tmp_path: Path) -> None:
    """onnxruntime's own error."""
    code = """
options = onnxruntime.SessionOptions()
options.use_per_session_threads = False
with ModelHost() as host:
    for cls in (onnxruntime.InferenceSession, InferenceSessionProxy):
        try:
            cls(scaled(), options, CPU, host=host).get_inputs()
        except Exception as error:
            print(type(error).__name__, repr(str(error)))
"""
    lines = ran(code, tmp_path).splitlines()
    real, ours = lines[: len(lines) // 2], lines[len(lines) // 2 :]
    assert real == ours  # what is printed, too
    assert "per session threadpools" in real[-1]


def test_severity(tmp_path: Path) -> None:
    """onnxruntime warns of an initializer among the inputs, unless the process does not want to hear it."""
    code = """
onnxruntime.set_default_logger_severity(3)
with ModelHost() as host:
    InferenceSessionProxy(fixed(), providers=CPU, host=host).get_inputs()
"""
    assert ran(code, tmp_path) == ""


def test_an_allocator_of_the_process_is_refused_by_name(tmp_path: Path) -> None:
    code = """
info = onnxruntime.OrtMemoryInfo(
    "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
)
onnxruntime.create_and_register_allocator(info, None)
options = onnxruntime.SessionOptions()
with ModelHost() as host:
    print(InferenceSessionProxy(scaled(), options, CPU, host=host).get_providers())
    options.add_session_config_entry("session.use_env_allocators", "1")
    try:
        InferenceSessionProxy(scaled(), options, CPU, host=host)
    except ConfigError as error:
        print(error)
"""
    plain, refused = ran(code, tmp_path).splitlines()
    assert plain == "['CPUExecutionProvider']"
    assert "create_and_register_allocator()" in refused


def test_options_that_were_made_before(tmp_path: Path) -> None:
    code = """
with ModelHost() as host:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        InferenceSessionProxy(scaled(), early, CPU, host=host)
        InferenceSessionProxy(scaled(), early, CPU, host=host)
    text = str(caught[0].message)
    print(len(caught), "add_initializer" in text, "Import onnx_dl first" in text)
    for use in (told, None):
        warnings.simplefilter("ignore")
        try:
            if use is told:
                InferenceSessionProxy(scaled(), told, CPU, host=host)
            else:
                late = onnxruntime.RunOptions()
                late.add_active_adapter(adapter)
                InferenceSessionProxy(scaled(), providers=CPU, host=host).run(None, {}, late)
        except ConfigError as error:
            text = str(error)
            print("Import onnx_dl" in text, "add_provider()" in text, "LoraAdapter" in text)
"""
    first = (
        "import onnxruntime; early = onnxruntime.SessionOptions(); told = onnxruntime.SessionOptions(); "
        "told.add_provider('CPUExecutionProvider', {}); adapter = onnxruntime.LoraAdapter()"
    )
    assert ran(code, tmp_path, first).splitlines() == ["1 True True", "True True False", "True False True"]


def test_adapters(tmp_path: Path) -> None:
    code = """
import numpy as np
adapter_format = onnxruntime.AdapterFormat()
adapter_format.set_adapter_version(1)
adapter_format.set_model_version(1)
five = onnxruntime.OrtValue.ortvalue_from_numpy(np.full((1, 1), 5, np.float32))
adapter_format.set_parameters({"lora": five})
import tempfile, os
path = os.path.join(tempfile.mkdtemp(), "a.onnx_adapter")
adapter_format.export_adapter(path)
zeros = numpy_helper.from_array(np.zeros((1, 1), np.float32), "lora")
source = model(
    [node("Add", ["x", "lora"], ["y"])],
    [tensor("x", F, [1, 1]), tensor("lora", F, [1, 1])], [tensor("y", F, [1, 1])], [zeros],
)
adapter = onnxruntime.LoraAdapter()
adapter.Load(path)
options = onnxruntime.RunOptions()
options.add_active_adapter(adapter)
x = np.ones((1, 1), np.float32)
onnxruntime.set_default_logger_severity(3)
real = onnxruntime.InferenceSession(source, providers=CPU).run(None, {"x": x}, options)[0]
with ModelHost() as host:
    proxy = InferenceSessionProxy(source, providers=CPU, host=host)
    print(real.tolist(), *(proxy.run(None, {"x": x}, ro)[0].tolist() for ro in (options, None)))
"""
    assert ran(code, tmp_path) == "[[6.0]] [[6.0]] [[1.0]]\n"


def test_values_are_made_all_the_same(tmp_path: Path) -> None:
    """Some take a small session in this process, which must not have threads of its own then."""
    code = """
onnxruntime.set_global_thread_pool_sizes(2, 1)
from onnx_dl.ort import onnx_builder as makers
made = makers.sequence("seq(tensor(float))", [np.ones(1, np.float32)])
print(makers.absent().has_value(), makers.read(made))
"""
    assert ran(code, tmp_path) == "False [array([1.], dtype=float32)]\n"


def test_a_function_that_was_taken_back(tmp_path: Path) -> None:
    code = """
options = onnxruntime.SessionOptions()
options.set_ep_context_data_read_func(lambda *a: None, 100)
options.clear_ep_context_data_read_func()
with ModelHost() as host:
    print(InferenceSessionProxy(scaled(), options, CPU, host=host).get_providers())
"""
    assert ran(code, tmp_path) == "['CPUExecutionProvider']\n"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_a_worker_has_threads_for_the_processors_it_may_use(tmp_path: Path) -> None:
    """onnxruntime itself makes one for each processor of the machine."""
    code = """
import os
with ModelHost() as host:
    proxy = InferenceSessionProxy(scaled(), providers=CPU, host=host)
    proxy.load()
    (status,) = host.snapshot().models
    print(len(os.listdir(f"/proc/{status.pid}/task")), proxy.get_session_options().intra_op_num_threads)
"""
    one = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    (all_threads, told), (few, told_of_one) = (ran(code, tmp_path, first).split() for first in ("", one))
    assert int(few) < int(all_threads)
    assert told == told_of_one == "0"
