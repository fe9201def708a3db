"""What a session tells of itself, and what can be changed of it afterwards."""

from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto

from tests.contract.both import (
    CPU,
    FAIL,
    I64,
    STR,
    C,
    F,
    Fail,
    Make,
    equal,
    fixed,
    identity,
    mapping,
    maps,
    model,
    node,
    ones,
    optional,
    plain,
    raised,
    scaled,
    sequence,
    tensor,
)

FEED = {"a": ones(2, 3), "b": ones(1, 3)}
GETTERS = [
    "get_inputs", "get_outputs", "get_overridable_initializers", "get_modelmeta", "get_input_memory_infos",
    "get_output_memory_infos", "get_input_epdevices", "get_providers", "get_provider_options",
    "get_session_options",
]  # fmt: skip


@pytest.mark.parametrize("name", GETTERS)
def test_each_call_gives_the_same_object(make: Make, name: str) -> None:
    session = make(fixed())
    found, real = getattr(session, name)(), getattr(make.twin(session), name)()
    assert getattr(session, name)() is found
    if name not in ("get_modelmeta",):
        assert type(found) is type(real)


# --- inputs and outputs ------------------------------------------------------------------------------------


def test_inputs_and_outputs(make: Make) -> None:
    session = make(fixed())
    assert [str(node) for node in session.get_inputs()] == [
        "NodeArg(name='a', type='tensor(float)', shape=[2, 3])",
        "NodeArg(name='b', type='tensor(float)', shape=['N', 3])",
    ]
    assert [(o.name, o.type, o.shape) for o in session.get_outputs()] == [
        ("sum", "tensor(float)", [2, 3]),
        ("product", "tensor(float)", [2, 3]),
    ]
    (initializer,) = session.get_overridable_initializers()
    assert repr(initializer) == str(initializer) == "NodeArg(name='w', type='tensor(float)', shape=[3])" or (
        repr(initializer).startswith("<onnxruntime.")
    )


def test_shapes_that_are_not_known(make: Make) -> None:
    nodes = [node("Identity", ["x"], ["y"])]
    session = make(model(nodes, [tensor("x", F, ["N", "", -1, None, 3])], [tensor("y", F)]))
    assert session.get_inputs()[0].shape == ["N", None, None, None, 3]
    assert make(identity(F, None)).get_inputs()[0].shape == []
    assert make(identity(F, [])).get_inputs()[0].shape == []
    assert make(identity(F, [0])).get_inputs()[0].shape == [0]


def test_types(make: Make) -> None:
    same = [node("Identity", ["x"], ["y"])]
    vectorized = node("DictVectorizer", ["x"], ["y"], domain="ai.onnx.ml", int64_vocabulary=[1])
    zipped = node("ZipMap", ["x"], ["y"], domain="ai.onnx.ml", classlabels_strings=["a"])
    for source, expected in {
        identity(STR): ("tensor(string)", "tensor(string)"),
        identity(TensorProto.BFLOAT16): ("tensor(bfloat16)", "tensor(bfloat16)"),
        identity(TensorProto.FLOAT16): ("tensor(float16)", "tensor(float16)"),
        identity(TensorProto.BOOL): ("tensor(bool)", "tensor(bool)"),
        model(same, [sequence("x", STR)], [sequence("y", STR)]): ("seq(tensor(string))",) * 2,
        model(same, [optional("x")], [optional("y")]): ("optional(tensor(float))",) * 2,
        model([vectorized], [mapping("x", I64, F)], [tensor("y", F)]): (
            "map(int64,tensor(float))",
            "tensor(float)",
        ),
        model([zipped], [tensor("x", F, ["N", 1])], [maps("y", STR)]): (
            "tensor(float)",
            "seq(map(string,tensor(float)))",
        ),
    }.items():
        session = make(source)
        assert (session.get_inputs()[0].type, session.get_outputs()[0].type) == expected


def test_a_node_arg_cannot_be_changed(make: Make) -> None:
    (x,) = make(scaled()).get_inputs()
    for name in ("name", "type", "shape"):
        assert type(raised(setattr, x, name, "other")) is AttributeError
    assert type(raised(setattr, x, "foo", 1)) is AttributeError
    assert type(raised(lambda: x.foo)) is AttributeError
    assert x == x and x != "x"
    x.shape.append(5)
    assert x.shape == ["N", "M"]


def test_it_outlives_the_session(make: Make) -> None:
    session = make(fixed())
    inputs, meta, providers = session.get_inputs(), session.get_modelmeta(), session.get_providers()
    del session
    gc.collect()
    assert (inputs[0].name, meta.graph_name, providers) == ("a", "contract", CPU)


# --- the model's own words ---------------------------------------------------------------------------------


def test_modelmeta(make: Make) -> None:
    session = make(fixed())
    meta = session.get_modelmeta()
    fields = {
        "custom_metadata_map": {"author": "us"},
        "description": "a model",
        "domain": "there",
        "graph_description": "",
        "graph_name": "contract",
        "producer_name": "tests",
        "version": 3,
    }
    assert {name: getattr(meta, name) for name in fields} == fields
    meta.graph_name, meta.version, meta.custom_metadata_map = "changed", 9, {"k": "v"}
    again = session.get_modelmeta()
    assert (again.graph_name, again.version, again.custom_metadata_map) == ("changed", 9, {"k": "v"})
    assert make.twin(session).get_modelmeta().graph_name == "contract"


def test_modelmeta_of_a_model_that_says_little(make: Make) -> None:
    meta = make(model([node("Neg", ["x"], ["y"])], [tensor("x")], [tensor("y")], properties={"a": ""}))
    assert meta.get_modelmeta().custom_metadata_map == {"a": ""}


# --- where it runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("get_input_memory_infos", 2), ("get_output_memory_infos", 2)])
def test_memory_infos(make: Make, name: str, count: int) -> None:
    session = make(fixed())
    twin = make.twin(session)  # what a real session gives here dangles when the session is gone
    found, real = getattr(session, name)(), getattr(twin, name)()
    assert len(found) == count
    fields = ["allocator_type", "device_id", "device_mem_type", "device_vendor_id", "mem_type", "name"]
    for one, other in zip(found, real, strict=True):
        assert type(one) is C.OrtMemoryInfo
        assert [getattr(one, field) for field in fields] == [getattr(other, field) for field in fields]
    assert (found[0].name, found[0].device_id) == ("Cpu", 0)


def test_epdevices(make: Make) -> None:
    found = make(fixed()).get_input_epdevices()
    assert len(found) == 2
    for device in found:
        assert type(device) is C.OrtEpDevice
        assert (device.ep_name, device.ep_vendor) == ("CPUExecutionProvider", "Microsoft")
        assert device.device.type == C.OrtHardwareDeviceType.CPU
        assert device in onnxruntime.get_ep_devices()


def test_providers(make: Make) -> None:
    session = make(fixed())
    assert session.get_providers() == CPU
    assert session.get_provider_options() == {"CPUExecutionProvider": {}}
    given = make(fixed(), providers=[("CPUExecutionProvider", {"use_arena": "0"})])
    assert given.get_provider_options() == {"CPUExecutionProvider": {}}


def test_the_graphs_assignment(make: Make) -> None:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    found = make(fixed(), options).get_provider_graph_assignment_info()
    told = [(part.ep_name, [(n.name, n.domain, n.op_type) for n in part.get_nodes()]) for part in found]
    assert told == [("CPUExecutionProvider", [("", "", "Add")]), ("CPUExecutionProvider", [("", "", "Mul")])]
    phrase = "Session configuration entry 'session.record_ep_graph_assignment_info' must be set to \"1\""
    make.refuses(make(fixed()), lambda s: s.get_provider_graph_assignment_info(), Fail, phrase)


# --- set_providers -----------------------------------------------------------------------------------------


def test_set_providers(make: Make) -> None:
    session = make(fixed())
    before, meta, options = session.get_inputs(), session.get_modelmeta(), session.get_session_options()
    meta.graph_name = "changed"
    for arguments in [(CPU,), (), (None,), ([("CPUExecutionProvider", {})],), (CPU, [{}])]:
        assert session.set_providers(*arguments) is None
        assert session.get_providers() == CPU
        equal(session.run(["sum"], FEED), [np.full((2, 3), 2, np.float32)])
    assert session.get_inputs() is not before
    assert [i.name for i in before] == [i.name for i in session.get_inputs()]
    assert session.get_modelmeta().graph_name == "contract"
    assert session.get_session_options() is not options


NOT_SET: dict[str, tuple[tuple, str]] = {
    "number": (([3],), "'providers' values must be either strings or (string, dict) tuples."),
    "set": (({"A"},), "'providers' should be a sequence."),
    "length": ((CPU, [{}, {}]), "'providers' and 'provider_options' should be the same length if both are"),
    "options": ((CPU, [1]), "'provider_options' values must be dicts."),
}


@pytest.mark.parametrize("what", NOT_SET)
def test_set_providers_that_are_refused(make: Make, what: str) -> None:
    arguments, phrase = NOT_SET[what]
    make.refuses(make(fixed()), lambda s: s.set_providers(*arguments), ValueError, phrase)


def test_after_a_failed_set_providers(make: Make) -> None:
    """Everything is gone, until providers are set that work."""
    session = make(fixed())
    with pytest.warns(UserWarning, match="Specified provider 'Nope' is not in available provider names"):
        error = raised(session.set_providers, ["Nope"])
    assert (type(error), str(error)) == (RuntimeError, "Unknown Provider Type: Nope")
    for name in GETTERS:
        assert getattr(session, name)() is None
    error = raised(session.run, None, FEED)
    assert type(error) is AttributeError
    assert str(error).startswith("'NoneType' object has no attribute ")
    error = raised(session.end_profiling)
    assert (type(error), str(error)) == (AttributeError, "'NoneType' object has no attribute 'end_profiling'")
    assert type(raised(session.io_binding)) in (TypeError, AttributeError)
    session.set_providers(CPU)
    assert session.get_providers() == CPU
    equal(session.run(["sum"], FEED), [np.full((2, 3), 2, np.float32)])


def test_a_binding_is_of_no_use_after_set_providers(make: Make) -> None:
    session = make(scaled())
    binding = session.io_binding()
    binding.bind_cpu_input("x", ones(1, 1))
    binding.bind_output("more")
    session.set_providers(CPU)
    error = raised(session.run_with_iobinding, binding)
    message = "IOBinding must be used with the session that created it."
    assert (type(error), str(error)) == (ValueError, message)


def test_fallback(make: Make) -> None:
    session = make(fixed())
    assert session._enable_fallback is True
    assert session.disable_fallback() is None
    assert session._enable_fallback is False
    assert session.enable_fallback() is None
    assert session._enable_fallback is True
    assert session._fallback_providers == CPU
    assert make(fixed(), enable_fallback=0)._enable_fallback is False


# --- the rest ----------------------------------------------------------------------------------------------


def test_tuning_results(make: Make) -> None:
    session = make(fixed())
    assert session.get_tuning_results() == []
    assert session.set_tuning_results([]) is None
    given = [{"ep": "CPUExecutionProvider", "validators": {}, "results": {}}]
    assert session.set_tuning_results(given) is None
    phrase = "Invalid TuningResults (index=0). CPUExecutionProvider does not support TunableOp."
    make.refuses(session, lambda s: s.set_tuning_results(given, error_on_invalid=True), RuntimeError, phrase)
    given[0]["ep"] = "Nope"
    phrase = "Cannot find execution provider Nope"
    make.refuses(session, lambda s: s.set_tuning_results(given, error_on_invalid=True), RuntimeError, phrase)
    make.refuses(session, lambda s: s.set_tuning_results([{}]), KeyError, "'ep'")
    assert type(raised(session.set_tuning_results, [], True)) is TypeError


def test_dynamic_options(make: Make) -> None:
    session = make(fixed())
    assert session.set_ep_dynamic_options({"a": "b"}) is None
    make.refuses(session, lambda s: s.set_ep_dynamic_options({}), RuntimeError, "No options were provided")
    error = raised(session.set_ep_dynamic_options, None)
    assert type(error) is TypeError
    assert str(error).startswith("set_ep_dynamic_options(): incompatible function arguments.")


def test_captured_graphs(make: Make) -> None:
    session = make(fixed())
    assert session.release_captured_graph() is None
    assert session.release_captured_graph(3) is None
    error = raised(session.release_captured_graph, "x")
    assert type(error) is TypeError
    assert str(error).startswith("release_captured_graph(): incompatible function arguments.")


def test_private_names(make: Make, tmp_path: Path) -> None:
    source = fixed()
    session = make(source)
    assert session._model_path is None
    assert session._model_bytes == source
    assert session._sess_options is session.get_session_options()
    assert session._sess_options_initial is None
    assert session._providers is session.get_providers()
    assert session._provider_options is session.get_provider_options()
    assert session._inputs_meta is session.get_inputs()
    assert session._outputs_meta is session.get_outputs()
    assert session._overridable_initializers is session.get_overridable_initializers()
    assert session._model_meta is session.get_modelmeta()
    assert session._read_config_from_model is False
    assert session._sess is not None
    path = tmp_path / "m.onnx"
    path.write_bytes(source)
    for given in (path, str(path)):
        session = make(given)
        assert (session._model_path, session._model_bytes) == (str(path), None)
    options = onnxruntime.SessionOptions()
    assert make(source, options)._sess_options_initial is options


def test_what_it_is(make: Make) -> None:
    session = make(fixed())
    assert isinstance(session, onnxruntime.InferenceSession)
    assert isinstance(session, onnxruntime.capi.onnxruntime_inference_collection.Session)
    assert not isinstance(session, onnxruntime.SessionOptions)
    assert not isinstance(session, dict)
    assert session.__class__ is onnxruntime.InferenceSession
    assert len({session, session}) == 1
    session.note = "mine"
    assert session.note == "mine"
    error = raised(lambda: session.nope)
    assert type(error) is AttributeError
    assert "object has no attribute 'nope'" in str(error)


def test_it_has_every_public_name(make: Make) -> None:
    names = {name for name in dir(onnxruntime.InferenceSession) if not name.startswith("_")}
    session = make(fixed())
    assert not {name for name in names if not hasattr(session, name)}


@pytest.mark.parametrize("kind", ["onnxruntime"])  # a proxy may: test_proxies_travel
def test_it_cannot_be_pickled_or_copied_deeply(make: Make) -> None:
    session = make(fixed())
    for act in (pickle.dumps, copy.deepcopy):
        error: Any = raised(act, session)
        assert type(error) is TypeError
        assert plain(error).startswith("cannot pickle ")
    assert FAIL.startswith("[ONNXRuntimeError]")
