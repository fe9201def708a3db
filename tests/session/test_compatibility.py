"""docs/compatibility.md against onnxruntime and against the tests it names, and what no other test tries."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as C

from onnx_dl import InferenceSessionProxy, ModelHost, errors
from onnx_dl.ort import options, ortvalues, recorder
from onnx_dl.session import io_binding
from tests.contract import both
from tests.contract.both import CPU, ones, ortvalue

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "compatibility.md").read_text()
CLASSES = {
    "InferenceSession": onnxruntime.InferenceSession,  # its methods are those of its base class, Session
    "IOBinding": onnxruntime.IOBinding,
    "OrtValue": onnxruntime.OrtValue,
    "SparseTensor": onnxruntime.SparseTensor,
    "SessionOptions": C.SessionOptions,
    "RunOptions": C.RunOptions,
    "ModelMetadata": C.ModelMetadata,
    "NodeArg": C.NodeArg,
}
READERS = {
    "get_session_config_entry": "how entries are read, by their keys",
    "has_providers": "says that add_provider() or the like was called, which is recorded",
    "get_run_config_entry": "how entries are read, by their keys",
}
"""Members of SessionOptions and RunOptions that tell something and set nothing."""
OF_THIS_PROCESS = {
    "copy_tensors",
    "disable_telemetry_events",
    "enable_telemetry_events",
    "get_all_providers",
    "get_available_providers",
    "get_build_info",
    "get_device",
    "get_ep_devices",
    "get_version_string",
    "has_collective_ops",
    "import_capi_exception",
    "preload_dlls",
    "print_debug_info",
}
"""onnxruntime's functions that say or do something here and have no effect on sessions elsewhere."""
NEWEST = pytest.mark.skipif(
    [int(part) for part in onnxruntime.__version__.split(".")[:2]] < [1, 31], reason="lacks what came later"
)
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| name |")
]
NAMED = re.findall(r"`((?:\w+/)*\w+\.py)::(\w+)`", PAGE)


def public(cls: Any) -> set[str]:
    return {name for name in dir(cls) if not name.startswith("_")}


# --- the page ----------------------------------------------------------------------------------------------


def section(title: str) -> str:
    """The page's part under that heading."""
    (found,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return found


@pytest.mark.parametrize("name", CLASSES)
def test_every_public_name_is_on_the_page(name: str) -> None:
    assert {member for member in public(CLASSES[name]) if f"`{member}`" not in section(name)} == set()


@NEWEST
def test_the_page_invents_no_names() -> None:
    for name, cls in CLASSES.items():
        first = [row[0] for row in ROWS if f"| {row[0]} |" in section(name)]
        plain = [cell for cell in first if re.fullmatch(r"`\w+`(, `\w+`)*", cell)]  # others are prose
        members = {member for cell in plain for member in re.findall(r"\w+", cell)}
        assert members and members <= public(cls), name


def test_every_row_has_three_cells() -> None:
    assert len(ROWS) > 60
    assert [row for row in ROWS if len(row) != 3 or not all(row)] == []


def test_every_row_names_a_test_or_says_that_there_is_none() -> None:
    assert [row for row in ROWS if set(row[0]) != {"-"} and "::" not in row[2] and "none" not in row[2]] == []


@functools.cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_test_on_the_page_exists() -> None:
    assert len(NAMED) > 60
    assert len(NAMED) == PAGE.count("::")
    assert [f"{file}::{name}" for file, name in NAMED if name not in functions_of(file)] == []


# --- what the code covers ----------------------------------------------------------------------------------


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize(
    ("real", "ours"),
    [(onnxruntime.InferenceSession, InferenceSessionProxy), (onnxruntime.IOBinding, io_binding.IOBinding)],
    ids=["InferenceSession", "IOBinding"],
)
def test_methods_have_the_same_signatures(real: Any, ours: Any) -> None:
    """Same parameters in the same order with the same defaults; ours may have more by keyword only."""
    for name in sorted(public(real)):
        theirs = parameters(getattr(real, name))
        found = parameters(getattr(ours, name))
        more = found[len(theirs) :]
        assert found[: len(theirs)] == theirs, name
        assert all(kind is inspect.Parameter.KEYWORD_ONLY for _, kind, _ in more), name
        assert all(default is not inspect.Parameter.empty for *_, default in more), name


def test_the_constructors_own_arguments() -> None:
    """Ours has another fourth argument, which takes theirs, and theirs by name; the last takes the rest."""
    theirs = [name for name, *_ in parameters(onnxruntime.InferenceSession)]
    found = [name for name, *_ in parameters(InferenceSessionProxy)]
    assert theirs == ["path_or_bytes", "sess_options", "providers", "provider_options", "kwargs"]
    assert set(theirs) < set(found)
    assert found[1:3] == theirs[1:3] and found[-1] == theirs[-1]


def test_all_that_options_can_be_told_is_covered() -> None:
    """What a new onnxruntime adds to these classes fails here."""
    for cls, fields, methods in (
        (C.SessionOptions, options.SESSION_FIELDS, recorder.SESSION_METHODS),
        (C.RunOptions, options.RUN_FIELDS, recorder.RUN_METHODS),
    ):
        assert public(cls) - set(fields) - set(methods) <= set(READERS)


@NEWEST
def test_nothing_is_covered_that_is_not_there() -> None:
    assert {*options.SESSION_FIELDS, *recorder.SESSION_METHODS} <= public(C.SessionOptions)
    assert {*options.RUN_FIELDS, *recorder.RUN_METHODS} <= public(C.RunOptions)
    assert set(recorder.GLOBALS) <= public(onnxruntime)


def test_all_that_is_recorded_is_on_the_page() -> None:
    recorded = (*recorder.SESSION_METHODS, *recorder.RUN_METHODS, *recorder.GLOBALS)
    assert [name for name in recorded if f"`{name}`" not in PAGE] == []


def test_settings_of_the_process_are_covered() -> None:
    """What a new onnxruntime adds to its functions fails here."""
    functions = {name for name in public(onnxruntime) if inspect.isroutine(getattr(onnxruntime, name))}
    assert functions - set(recorder.GLOBALS) <= OF_THIS_PROCESS


# --- what no other test tries ------------------------------------------------------------------------------


@pytest.fixture
def proxy(host: ModelHost) -> Any:
    return functools.partial(InferenceSessionProxy, providers=CPU, host=host)


def adapted(make: Any, path: Path) -> list[Any]:
    """What a model gives with an adapter and then without."""
    adapter, run_options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(path))
    run_options.add_active_adapter(adapter)
    session, feed = make(both.fixed()), {"a": ones(2, 3), "b": ones(2, 3)}
    return [session.run(["product"], feed, given)[0].tolist() for given in (run_options, None)]


def test_an_adapter(proxy: Any, tmp_path: Path) -> None:
    made = onnxruntime.AdapterFormat()
    made.set_parameters({"w": ortvalue(np.full(3, 5, np.float32))})
    made.set_adapter_version(1)
    made.set_model_version(1)
    made.export_adapter(str(tmp_path / "five"))
    real = functools.partial(onnxruntime.InferenceSession, providers=CPU)
    expected = [[[10, 10, 10]] * 2, [[4, 4, 4]] * 2]
    assert [adapted(make, tmp_path / "five") for make in (real, proxy)] == [expected, expected]


def test_sparse_values_of_other_formats() -> None:
    """Parts that were taken apart make the same again."""
    device = onnxruntime.OrtDevice.make("cpu", 0)._get_c_device()
    shape, index, rows = np.array([2, 2]), np.array([1]), np.array([0, 1, 1])
    given = C.SparseTensor.sparse_csr_from_numpy(shape, ones(1), index, rows, device)
    wrapped = onnxruntime.OrtValue(C.OrtValue.ort_value_from_sparse_tensor(given))
    parts = ortvalues.take_apart(wrapped)
    assert parts is not None
    sparse = parts.items[0].items[0]
    assert sparse.kind == "csr"
    made = ortvalues.put_together(sparse.kind, sparse.items, copy=True)
    again = ortvalues.take_apart(made)
    assert again is not None and made.format == given.format
    for ours, theirs in zip(again.items, sparse.items, strict=True):
        assert np.array_equal(ours, theirs)


def test_block_sparse_values_tell_nothing() -> None:
    """If this fails, onnxruntime was mended, and such values can travel."""
    device = onnxruntime.OrtDevice.make("cpu", 0)._get_c_device()
    blocks = np.array([[0], [1]], np.int32)
    given = C.SparseTensor.blocksparse_from_numpy(np.array([2, 4]), ones(2, 2, 1), blocks, device)
    with pytest.raises(RuntimeError, match="Tensor type mismatch"):
        onnxruntime.SparseTensor(given).as_blocksparse_view().indices()


def test_a_provider_of_the_options(host: ModelHost) -> None:
    given = onnxruntime.SessionOptions()
    given.add_provider("CPUExecutionProvider", {})
    session = InferenceSessionProxy(both.identity(), given, host=host)
    assert session.get_providers() == CPU


def test_functions_of_this_process_are_refused(host: ModelHost) -> None:
    given, other = onnxruntime.SessionOptions(), onnxruntime.SessionOptions()
    given.set_provider_selection_policy_delegate(lambda *_: [])
    other.set_ep_context_data_read_func(lambda *_: None, 100)
    with pytest.raises(errors.ConfigError, match=r"set_provider_selection_policy_delegate\(\) was given"):
        InferenceSessionProxy(both.identity(), given, host=host)
    with pytest.raises(errors.ConfigError, match=r"set_ep_context_data_read_func\(\) was given"):
        InferenceSessionProxy(both.identity(), other, host=host)


def test_text_in_dtype_s_ends_where_the_item_ends(proxy: Any) -> None:
    text = np.array([b"abcd", b"ab"])
    real = onnxruntime.InferenceSession(both.identity(both.STR), providers=CPU)
    assert proxy(both.identity(both.STR)).run(None, {"x": text})[0].tolist() == ["abcd", "ab"]
    assert real.run(None, {"x": text})[0].tolist()[0].startswith("abcdab")


def test_before_a_run_there_is_nothing_to_copy(proxy: Any) -> None:
    bound = proxy(both.identity()).io_binding()
    bound.bind_output("y")
    with pytest.raises(RuntimeError, match=r"run_with_iobinding\(\) comes first"):
        bound.copy_outputs_to_cpu()


def test_small_results_of_a_call_share_memory(proxy: Any) -> None:
    first, second = proxy(both.fixed()).run(None, {"a": ones(2, 3), "b": ones(2, 3)})
    assert first.base is not None and first.base is second.base


def test_integers_of_64_bits_are_of_onnxruntimes_type(proxy: Any) -> None:
    real = onnxruntime.InferenceSession(both.identity(both.I64), providers=CPU)
    ours, theirs = (s.run(None, {"x": np.ones(1, "l")})[0] for s in (proxy(both.identity(both.I64)), real))
    assert (ours.dtype.char, theirs.dtype.char) == ("q", "q")


def test_a_model_that_unloads_needs_its_file(proxy: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(both.identity())
    session = proxy(path)
    session.load()
    session.unload()
    path.unlink()
    with pytest.raises(C.NoSuchFile):
        session.run(None, {"x": ones(1)})


def in_fresh_process(script: str) -> list[str]:
    """What a script printed that may set what is for the whole process."""
    begin = "import os; os.environ |= {'ORT_DISABLE_TELEMETRY': '1', 'ONNX_DL_CACHE': 'off'}\n"
    done = subprocess.run(
        [sys.executable, "-c", begin + script], capture_output=True, text=True, timeout=60, cwd=TESTS.parent
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


BOTH = "from onnx_dl import InferenceSessionProxy\nimport onnxruntime\nfrom tests.contract import both\n"


def test_the_seed_is_the_applications() -> None:
    script = (
        BOTH
        + """
model = both.model([both.node("RandomNormal", [], ["y"], shape=[9])], [], [both.tensor("y")])
onnxruntime.set_seed(7)
for cls in (onnxruntime.InferenceSession, InferenceSessionProxy):
    print(cls(model, providers=both.CPU).run(None, {})[0].tolist())
"""
    )
    real, ours = in_fresh_process(script)
    assert ours == real


def test_thread_pools_of_the_process() -> None:
    script = (
        BOTH
        + """
import psutil
onnxruntime.set_global_thread_pool_sizes(SIZE, 1)
options = onnxruntime.SessionOptions()
options.use_per_session_threads = False
session = InferenceSessionProxy(both.identity(), options, providers=both.CPU)
session.load()
from onnx_dl import default_host
(pid,) = (status.pid for status in default_host().snapshot().models)
print(psutil.Process(pid).num_threads())
"""
    )
    one, three = (int(in_fresh_process(script.replace("SIZE", size))[0]) for size in "13")
    assert three - one == 2


def test_loggers_of_the_process_tell_models_apart() -> None:
    script = (
        BOTH
        + """
sessions = [InferenceSessionProxy(both.identity(), providers=both.CPU) for _ in range(2)]
for tell in (onnxruntime.set_default_logger_severity, onnxruntime.set_default_logger_verbosity):
    tell(3)
    sessions.append(InferenceSessionProxy(both.identity(), providers=both.CPU))
for session in sessions:
    session.load()
from onnx_dl import default_host
print(len(default_host().snapshot().models))
"""
    )
    assert in_fresh_process(script) == ["3"]


def test_allocators_of_the_process_are_refused() -> None:
    script = (
        BOTH
        + """
kind = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
info = onnxruntime.OrtMemoryInfo("Cpu", kind, 0, onnxruntime.OrtMemType.DEFAULT)
onnxruntime.create_and_register_allocator(info, onnxruntime.OrtArenaCfg({}))
InferenceSessionProxy(both.identity(), providers=both.CPU, eager=True)
options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.use_env_allocators", "1")
try:
    InferenceSessionProxy(both.identity(), options, providers=both.CPU)
except Exception as error:
    print(type(error).__name__, "create_and_register_allocator()" in str(error))
"""
    )
    assert in_fresh_process(script) == ["ConfigError True"]


def test_options_that_are_older_than_we_are() -> None:
    script = """
import warnings
import onnxruntime
options = onnxruntime.SessionOptions()
import onnx_dl
from tests.contract import both
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    onnx_dl.InferenceSessionProxy(both.identity(), options, providers=both.CPU)
print([str(one.message)[:58] for one in seen])
"""
    assert in_fresh_process(script) == ["['This SessionOptions was made before onnx_dl was imported. ']"]


def test_what_cannot_move_stays_here_under_patch() -> None:
    script = (
        BOTH
        + """
import onnx_dl
options = onnxruntime.SessionOptions()
options.set_ep_context_data_read_func(lambda *_: None, 100)
with onnx_dl.patch():
    here = onnxruntime.InferenceSession(both.identity(), options, providers=both.CPU)
    away = onnxruntime.InferenceSession(both.identity(), providers=both.CPU)
print(type(here) is type(away) is onnxruntime.InferenceSession)
for trust in ({"sandbox": True}, {"sha256": "0" * 64}):
    with onnx_dl.patch(models={"*": trust}):
        try:
            onnxruntime.InferenceSession(both.identity(), options, providers=both.CPU)
        except onnx_dl.ConfigError:
            print("refused")
print([one.reason[:31] for one in onnx_dl.unpatched_report()])
"""
    )
    assert in_fresh_process(script) == ["True", "refused", "refused", "['set_ep_context_data_read_func()']"]
