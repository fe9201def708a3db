"""SessionOptions, RunOptions and providers as plain data and back."""

from __future__ import annotations

import types

import msgspec
import pytest

from onnx_dl.errors import ConfigError
from onnx_dl.ort import options

ort = pytest.importorskip("onnxruntime")


def travel(plain):
    """Over the wire."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(plain))


def differing(cls: type, changes: dict) -> object:
    made = cls()
    for name, value in changes.items():
        setattr(made, name, value)
    return made


SESSION = {
    "enable_cpu_mem_arena": False,
    "enable_mem_pattern": False,
    "enable_mem_reuse": False,
    "enable_profiling": True,
    "execution_mode": ort.ExecutionMode.ORT_PARALLEL,
    "execution_order": ort.ExecutionOrder.PRIORITY_BASED,
    "graph_optimization_level": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "inter_op_num_threads": 3,
    "intra_op_num_threads": 5,
    "log_severity_level": 4,
    "log_verbosity_level": 1,
    "logid": "mine",
    "optimized_model_filepath": "/tmp/o.onnx",
    "profile_file_prefix": "prefix",
    "use_deterministic_compute": True,
    "use_per_session_threads": False,
}
RUN = {
    "log_severity_level": 4,
    "log_verbosity_level": 1,
    "logid": "mine",
    "only_execute_path_to_fetches": True,
    "terminate": True,
}


def fields_of(cls: type) -> set[str]:
    return {name for name, member in vars(cls).items() if isinstance(member, property)}


def test_none_stays_none():
    assert options.read_session_options(None) is None
    assert options.read_run_options(None) is None
    assert options.read_providers(None) is None
    assert options.make_providers(None) is None


def test_every_property_of_onnxruntime_is_covered():
    assert fields_of(ort.SessionOptions) <= set(options.SESSION_FIELDS)
    assert fields_of(ort.RunOptions) <= {*options.RUN_FIELDS}
    assert set(SESSION) == set(options.SESSION_FIELDS)
    assert set(RUN) == set(options.RUN_FIELDS)


def test_defaults_round_trip():
    sent = ort.SessionOptions()
    plain = options.read_session_options(sent)
    assert options.read_session_options(options.make_session_options(travel(plain))) == plain
    run = options.read_run_options(ort.RunOptions())
    assert options.read_run_options(options.make_run_options(travel(run))) == run


@pytest.mark.parametrize("name", SESSION)
def test_each_session_field(name):
    sent = differing(ort.SessionOptions, {name: SESSION[name]})
    plain = options.read_session_options(sent)
    assert plain != options.read_session_options(ort.SessionOptions())  # it is a change
    got = options.make_session_options(travel(plain))
    assert getattr(got, name) == SESSION[name]
    assert options.read_session_options(got) == plain


def test_all_session_fields_together():
    plain = options.read_session_options(differing(ort.SessionOptions, SESSION))
    got = options.make_session_options(travel(plain))
    assert {name: getattr(got, name) for name in SESSION} == SESSION


@pytest.mark.parametrize("name", RUN)
def test_each_run_field(name):
    plain = options.read_run_options(differing(ort.RunOptions, {name: RUN[name]}))
    assert plain != options.read_run_options(ort.RunOptions())
    assert getattr(options.make_run_options(travel(plain)), name) == RUN[name]


def test_config_entries_of_every_known_key():
    sent, run = ort.SessionOptions(), ort.RunOptions()
    for key in options.SESSION_KEYS:
        sent.add_session_config_entry(key, f"v {key}")
    for key in options.RUN_KEYS:
        run.add_run_config_entry(key, f"v {key}")
    got = options.make_session_options(travel(options.read_session_options(sent)))
    assert all(got.get_session_config_entry(key) == f"v {key}" for key in options.SESSION_KEYS)
    got = options.make_run_options(travel(options.read_run_options(run)))
    assert all(got.get_run_config_entry(key) == f"v {key}" for key in options.RUN_KEYS)


def test_keys_are_listed_once():
    assert len(set(options.SESSION_KEYS)) == len(options.SESSION_KEYS)
    assert len(set(options.RUN_KEYS)) == len(options.RUN_KEYS)


def test_options_are_read_when_they_are_given():
    sent = ort.SessionOptions()
    plain = options.read_session_options(sent)
    sent.intra_op_num_threads = 9
    assert plain["intra_op_num_threads"] != 9


@pytest.mark.parametrize("value", [{}, "x", 5, object()], ids=lambda v: type(v).__name__)
def test_what_is_no_session_options_is_refused_as_by_onnxruntime(value):
    with pytest.raises(AttributeError):
        options.read_session_options(value)
    made = options.make_run_options(options.read_run_options(value))
    assert repr(made) == repr(value)  # for onnxruntime to refuse, which shows it


def test_fields_that_this_onnxruntime_lacks_are_left_out():
    old = types.SimpleNamespace(
        has_providers=lambda: False,
        intra_op_num_threads=2,
        get_session_config_entry=lambda key: (_ for _ in ()).throw(RuntimeError("not set")),
    )
    assert options.read_session_options(old) == {"intra_op_num_threads": 2, "config": {}}


@pytest.mark.parametrize(
    ("given", "made"),
    [
        (["CPUExecutionProvider"], ["CPUExecutionProvider"]),
        ((), []),
        (
            [("CUDAExecutionProvider", {"device_id": 0, "x": "y"})],
            [("CUDAExecutionProvider", {"device_id": 0, "x": "y"})],
        ),
        (["A", ["B", {"f": 1.5, "b": True, "n": None}]], ["A", ("B", {"f": 1.5, "b": True, "n": None})]),
        ([{"device_id": "1"}, {}], [{"device_id": "1"}, {}]),
    ],
    ids=repr,
)
def test_providers(given, made):
    assert options.make_providers(travel(options.read_providers(given))) == made


@pytest.mark.parametrize(
    "bad", [[object()], [("A", {"x": {1}})], [b"A"], [["A", {"s": object()}]]], ids=lambda b: repr(b)[:20]
)
def test_providers_that_cannot_travel(bad):
    with pytest.raises(ConfigError, match=r"cannot hold a (object|set|bytes)"):
        options.read_providers(bad)


@pytest.mark.parametrize(
    "given",
    [
        ["CPUExecutionProvider", ("CUDAExecutionProvider", {"user_compute_stream": "94"})],
        {
            "calls": [
                ["add_provider", ["CUDAExecutionProvider", {"$dict": [["gpu_external_alloc", "94"]]}], {}]
            ]
        },
        [{"has_user_compute_stream": 1}],
    ],
    ids=str,
)
def test_addresses_of_this_process_are_refused_by_name(given: object) -> None:
    with pytest.raises(ConfigError, match=r"(_stream|gpu_external_alloc)=.* is an address of this"):
        options.check_addresses(given)


def test_options_that_say_that_there_is_no_address() -> None:
    unset = {"user_compute_stream": "0", "has_user_compute_stream": "0", "gpu_external_free": ""}
    options.check_addresses([("CUDAExecutionProvider", unset | {"device_id": 1})], None)
