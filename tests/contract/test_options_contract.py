"""SessionOptions: that each of them reaches the session, and what becomes of the files and values in them."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from tests.contract.both import (
    FAIL,
    IA,
    C,
    F,
    Fail,
    InvalidArgument,
    Make,
    equal,
    fixed,
    model,
    node,
    ones,
    ortvalue,
    raised,
    scaled,
    tensor,
)

READABLE: dict[str, Any] = {
    "enable_cpu_mem_arena": False,
    "enable_mem_pattern": False,
    "enable_mem_reuse": False,
    "execution_mode": onnxruntime.ExecutionMode.ORT_PARALLEL,
    "execution_order": onnxruntime.ExecutionOrder.PRIORITY_BASED,
    "graph_optimization_level": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "inter_op_num_threads": 2,
    "intra_op_num_threads": 3,
    "log_severity_level": 3,
    "log_verbosity_level": 1,
    "logid": "mine",
    "use_deterministic_compute": True,
    "profile_file_prefix": "other_",
}
ROOT = Path(__file__).parents[2]
MISSING_KEY = "SessionOptions does not have configuration with key: {}"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def options(**values: Any) -> onnxruntime.SessionOptions:
    made = onnxruntime.SessionOptions()
    for name, value in values.items():
        setattr(made, name, value)
    return made


def times() -> bytes:
    """x[3] * w[3] -> y, where w is an initializer of twos."""
    weights = numpy_helper.from_array(np.full(3, 2, np.float32), "w")
    return model([node("Mul", ["x", "w"], ["y"])], [tensor("x", F, [3])], [tensor("y", F, [3])], [weights])


def result(session: Any) -> list[float]:
    return session.run(None, {"x": ones(3)})[0].tolist()


# --- what can be read --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READABLE)
def test_each_option_travels(make: Make, name: str) -> None:
    session = make(times(), options(**{name: READABLE[name]}))
    found = session.get_session_options()
    assert getattr(found, name) == READABLE[name]
    for other in READABLE:
        if other != name:
            assert getattr(found, other) == getattr(onnxruntime.SessionOptions(), other)
    assert result(session) == [2, 2, 2]


def test_all_options_at_once(make: Make) -> None:
    found = make(times(), options(**READABLE)).get_session_options()
    assert {name: getattr(found, name) for name in READABLE} == READABLE
    assert (found.enable_profiling, found.optimized_model_filepath) == (False, "")
    assert found.use_per_session_threads


def test_defaults(make: Make) -> None:
    found, plain = make(times()).get_session_options(), onnxruntime.SessionOptions()
    assert type(found) is onnxruntime.SessionOptions
    for name in [*READABLE, "enable_profiling", "optimized_model_filepath", "use_per_session_threads"]:
        assert getattr(found, name) == getattr(plain, name)
    assert not found.has_providers()


POOLS = """
import numpy as np, onnxruntime
from tests.contract.both import CPU, scaled
x = {"x": np.ones((1, 1), np.float32)}
onnxruntime.set_global_thread_pool_sizes(2, 1)
own = onnxruntime.SessionOptions()
shared = onnxruntime.SessionOptions()
shared.use_per_session_threads = False
from onnx_dl import InferenceSessionProxy
cls = onnxruntime.InferenceSession if KIND == "onnxruntime" else InferenceSessionProxy
how = {"onnxruntime": {}, "proxy": {"eager": True}, "inprocess": {"eager": True, "isolation": False}}[KIND]
for options in (None, own, shared):
    try:
        session = cls(scaled(), options, providers=CPU, **how)
    except RuntimeError as error:
        print(type(error) is RuntimeError, str(error))
    else:
        found = session.get_session_options()
        print(found.use_per_session_threads, found.intra_op_num_threads, found.inter_op_num_threads)
        print(session.run(["twice"], x)[0].item())
"""


def test_threads_of_the_process(kind: str) -> None:
    """They are set once per process: in one of its own."""
    script = POOLS.replace("KIND", repr(kind))
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    refused = [line for line in lines if line.startswith("True ")]
    assert len(refused) == 2
    assert all(line.endswith("must be false when using a global thread pool") for line in refused)
    assert lines[-2:] == ["False 0 0", "2.0"]


def test_the_options_in_force_are_a_copy(make: Make) -> None:
    given = options(intra_op_num_threads=2)
    session = make(times(), given)
    found = session.get_session_options()
    assert found is not given
    assert found is session.get_session_options()
    given.intra_op_num_threads = 7
    assert found.intra_op_num_threads == session.get_session_options().intra_op_num_threads == 2
    found.logid = "changed"
    assert session.get_session_options().logid == "changed"
    assert given.logid == ""
    del session
    gc.collect()
    assert found.intra_op_num_threads == 2


def test_options_are_read_when_the_session_is_made(make: Make) -> None:
    given = options(intra_op_num_threads=2)
    first = make(times(), given)
    given.intra_op_num_threads = 4
    given.add_session_config_entry("late.key", "v")
    second = make(times(), given)
    assert first.get_session_options().intra_op_num_threads == 2
    assert second.get_session_options().intra_op_num_threads == 4
    assert second.get_session_options().get_session_config_entry("late.key") == "v"
    error = raised(first.get_session_options().get_session_config_entry, "late.key")
    assert (type(error), str(error)) == (RuntimeError, MISSING_KEY.format("late.key"))


def test_entries(make: Make) -> None:
    given, entries = options(), {
        "session.intra_op.allow_spinning": "0",
        "session.disable_prepacking": "1",
        "nobody.knows.this": "a value = with, signs; ä",
        "empty": "",
    }  # fmt: skip
    for key, value in entries.items():
        given.add_session_config_entry(key, value)
    session = make(times(), given)
    found = session.get_session_options()
    assert {key: found.get_session_config_entry(key) for key in entries} == entries
    for missing in ("other", "session.intra_op.spin_duration_us"):  # a worker sets the second
        error = raised(found.get_session_config_entry, missing)
        assert str(error) == MISSING_KEY.format(missing)
    assert result(session) == [2, 2, 2]


def test_subclassed_options(make: Make) -> None:
    class Mine(onnxruntime.SessionOptions):
        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = 2
            self.note = "mine"

    found = make(times(), Mine()).get_session_options()
    assert type(found) is onnxruntime.SessionOptions
    assert found.intra_op_num_threads == 2


@pytest.mark.parametrize(
    ("key", "value", "phrase"),
    [("session.load_model_format", "ORT", "ORT model verification failed.")],
)
def test_entries_that_are_refused(make: Make, key: str, value: str, phrase: str) -> None:
    given = options()
    given.add_session_config_entry(key, value)
    error, real = raised(make, times(), given), raised(onnxruntime.InferenceSession, times(), given)
    assert type(error) is type(real) is Fail
    assert str(error) == str(real)
    assert phrase in str(error)


# --- dimensions --------------------------------------------------------------------------------------------


def test_a_free_dimension_by_name(make: Make) -> None:
    given = options()
    given.add_free_dimension_override_by_name("N", 4)
    session = make(scaled(), given)
    assert [i.shape for i in session.get_inputs()] == [[4, "M"]]
    assert [o.shape for o in session.get_outputs()] == [[4, "M"]] * 2
    phrase = "Got invalid dimensions for input: x for the following indices\n index: 0 Got: 2 Expected: 4\n"
    make.refuses(session, lambda s: s.run(None, {"x": ones(2, 3)}), InvalidArgument, IA + phrase)
    equal(session.run(["more"], {"x": ones(4, 1)}), [ones(4, 1) * 2])
    given.add_free_dimension_override_by_name("M", 5)
    assert make(scaled(), given).get_inputs()[0].shape == [4, 5]
    assert session.get_inputs()[0].shape == [4, "M"]


def test_a_free_dimension_by_denotation(make: Make) -> None:
    x = helper.make_tensor_value_info("x", F, ["Q", 3])
    x.type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    given = options()
    given.add_free_dimension_override_by_denotation("DATA_BATCH", 5)
    given.add_free_dimension_override_by_denotation("NOBODY", 6)
    session = make(model([node("Neg", ["x"], ["y"])], [x], [tensor("y", F, ["Q", 3])]), given)
    assert session.get_inputs()[0].shape == session.get_outputs()[0].shape == [5, 3]


# --- initializers ------------------------------------------------------------------------------------------


def test_an_initializer_is_replaced(make: Make) -> None:
    given, value = options(), ortvalue(np.full(3, 5, np.float32))
    given.add_initializer("w", value)
    session = make(times(), given)
    assert result(session) == [5, 5, 5]
    given.add_initializer("nobody", value)
    assert result(make(times(), given)) == [5, 5, 5]
    assert result(make(times())) == [2, 2, 2]


def test_a_replaced_initializer_is_live_memory(make: Make) -> None:
    given, array = options(), np.full(3, 5, np.float32)
    value = ortvalue(array)
    given.add_initializer("w", value)
    session = make(times(), given)
    assert result(session) == [5, 5, 5]
    value.update_inplace(np.full(3, 7, np.float32))
    assert result(session) == [7, 7, 7]
    array[:] = 9
    assert result(session) == [9, 9, 9]
    equal(session.run_with_ort_values(None, {"x": ortvalue(ones(3))})[0].numpy(), ones(3) * 9)


def test_an_initializer_that_is_an_input_is_replaced(make: Make) -> None:
    given = options()
    value = ortvalue(np.full(3, 5, np.float32))
    given.add_initializer("w", value)
    feed = {"a": ones(2, 3), "b": ones(1, 3)}
    assert make(fixed(), given).run(["product"], feed)[0].tolist() == [[10] * 3] * 2


def test_an_initializer_must_be_an_ortvalue(make: Make) -> None:
    given = options()
    error = raised(given.add_initializer, "w", ones(3))
    assert type(error) is RuntimeError
    assert "The provided Python object must be an OrtValue" in str(error)
    assert result(make(times(), given)) == [2, 2, 2]


def external(location: str = "w.bin") -> tuple[bytes, bytes]:
    """:func:`times`, with its weights in a file of their own."""
    made = onnx.load_from_string(times())
    (weights,) = made.graph.initializer
    raw = weights.raw_data
    weights.ClearField("raw_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": str(len(raw))}.items():
        weights.external_data.add(key=key, value=value)
    return made.SerializeToString(), raw


def test_external_initializers(make: Make) -> None:
    source, _ = external()
    given, value = options(), ortvalue(np.full(3, 4, np.float32))
    given.add_external_initializers(["w"], [value])
    session = make(source, given)
    assert result(session) == [4, 4, 4]
    value.update_inplace(np.full(3, 9, np.float32))
    assert result(session) == [4, 4, 4]  # copied, unlike the others


def test_external_initializers_from_files_in_memory(make: Make) -> None:
    source, raw = external()
    given = options()
    given.add_external_initializers_from_files_in_memory(["w.bin"], [raw], [len(raw)])
    assert result(make(source, given)) == [2, 2, 2]


def test_external_data_lies_beside_the_model(make: Make, folder: Path) -> None:
    source, raw = external()
    (folder / "sub").mkdir()
    (folder / "sub" / "m.onnx").write_bytes(source)
    (folder / "sub" / "w.bin").write_bytes(raw)
    assert result(make("sub/m.onnx")) == [2, 2, 2]
    error, real = raised(make, source), raised(onnxruntime.InferenceSession, source)
    assert type(error) is type(real) is Fail
    assert str(error) == str(real)
    assert "External data path" in str(error)


# --- files -------------------------------------------------------------------------------------------------


def test_a_profile(make: Make, folder: Path) -> None:
    session = make(times(), options(enable_profiling=True, profile_file_prefix="pre"))
    assert session.get_session_options().enable_profiling
    start = session.get_profiling_start_time_ns()
    if callable(start):  # onnxruntime 1.24 and older forget to call it
        start = start()
    assert type(start) is int and start > 0
    result(session)
    name = session.end_profiling()
    assert name.startswith("pre_") and name.endswith(".json")
    events = json.loads((folder / name).read_text())
    assert any("Mul" in str(event.get("args", {}).get("op_name")) for event in events)
    assert [path.name for path in folder.iterdir()] == [name]
    assert session.end_profiling() == ""
    assert result(session) == [2, 2, 2]


def test_a_profile_elsewhere(make: Make, folder: Path) -> None:
    (folder / "sub").mkdir()
    for prefix in ("sub/relative", str(folder / "absolute")):
        session = make(times(), options(enable_profiling=True, profile_file_prefix=prefix))
        name = session.end_profiling()
        assert name.startswith(prefix + "_")
        assert Path(name).exists()


def test_no_profile(make: Make, folder: Path) -> None:
    session = make(times())
    result(session)
    assert session.end_profiling() == ""
    assert session.get_profiling_start_time_ns() == 0
    assert not list(folder.iterdir())


def test_the_optimized_model(make: Make, folder: Path) -> None:
    make(times(), options(optimized_model_filepath="optimized.onnx"))
    assert onnx.load(folder / "optimized.onnx").graph.node[0].op_type == "Mul"
    session = make(times(), options(optimized_model_filepath=str(folder / "second.onnx")))
    assert session.get_session_options().optimized_model_filepath == str(folder / "second.onnx")
    assert result(make("second.onnx")) == [2, 2, 2]


def test_an_optimized_model_that_cannot_be_written(make: Make) -> None:
    given = options(optimized_model_filepath="no/such/folder.onnx")
    error, real = raised(make, times(), given), raised(onnxruntime.InferenceSession, times(), given)
    assert type(error) is type(real) is InvalidArgument
    assert str(error) == str(real)
    assert "SystemError : 2" in str(error)


def test_a_library_that_is_not_there() -> None:
    error = raised(onnxruntime.SessionOptions().register_custom_ops_library, "/nope.so")
    assert type(error) is Fail
    assert str(error).startswith(FAIL + "Failed to load library /nope.so with error: /nope.so: cannot open")


# --- providers ---------------------------------------------------------------------------------------------


def test_providers_in_the_options(make: Make) -> None:
    given = options()
    given.add_provider_for_devices(
        [device for device in onnxruntime.get_ep_devices() if device.ep_name == "CPUExecutionProvider"][:1],
        {},
    )
    assert given.has_providers()
    session = make(times(), given, providers=None)
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert result(session) == [2, 2, 2]
    with pytest.warns(UserWarning, match="Specified 'providers'/'provider_options' when creating") as seen:
        session = make(times(), given)
    assert "SessionOptions has already been configured with providers" in str(seen[0].message)
    assert result(session) == [2, 2, 2]


def test_a_policy_in_the_options(make: Make) -> None:
    given = options()
    given.set_provider_selection_policy(C.OrtExecutionProviderDevicePolicy.PREFER_CPU)
    session = make(times(), given, providers=None)
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert result(session) == [2, 2, 2]


def test_a_load_that_is_cancelled(make: Make) -> None:
    given = options()
    given.set_load_cancellation_flag(True)
    error, real = raised(make, times(), given), raised(onnxruntime.InferenceSession, times(), given)
    assert type(error) is type(real)
    assert str(error) == str(real)
