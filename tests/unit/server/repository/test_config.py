"""Configurations: what is understood, what is told once, what is refused with file and line."""

from __future__ import annotations

from typing import Any

import pytest

from onnx_dl.server.interfaces import TensorInfo
from onnx_dl.server.repository import completion, config
from onnx_dl.server.repository.config import Configuration
from onnx_dl.server.repository.signature import ModelSignature, Unservable
from onnx_dl.server.repository.source import Refused, Source

FILE = "/models/m/config.pbtxt"
MODEL = ModelSignature(
    (TensorInfo("x", "FP32", (-1, 3)), TensorInfo("s", "BYTES", (-1, 1))),
    (TensorInfo("y", "FP32", (-1, 2)), TensorInfo("z", "INT64", (-1,))),
    (TensorInfo("w", "FP32", (3,)),),
)


def understood(text: str) -> tuple[Configuration, Source]:
    source = Source.of_text(text, FILE)
    return config.understood(source, "m"), source


def parameter(name: str, value: str) -> str:
    return f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}\n'


def complete(text: str, model: ModelSignature = MODEL) -> completion.Completed:
    found, source = understood(text)
    return completion.complete("m", "model.onnx", model, found, source)


def test_nothing_is_needed() -> None:
    found, source = understood("")
    assert found == Configuration()
    assert found.arguments == {"ttl": 300.0}
    assert not source.notes


def test_our_parameters() -> None:
    given = {
        "ttl": "5m", "pin": "true", "priority": "-2", "latency": "low", "max_memory": "300MB",
        "max_memory_hard": "1GiB", "max_runs": "7", "group": "speech", "eager": "on", "sandbox": "no",
    }  # fmt: skip
    found, source = understood("".join(parameter(f"onnx_dl.{name}", value) for name, value in given.items()))
    assert found.is_eager
    assert found.arguments == {
        "ttl": 300.0, "pin": True, "priority": -2, "latency": "low", "max_memory": 300_000_000,
        "max_memory_hard": 1 << 30, "max_runs": 7, "group": "speech", "sandbox": False,
    }  # fmt: skip
    assert not source.notes
    assert understood(parameter("onnx_dl.ttl", "-1"))[0].arguments["ttl"] == -1
    assert understood(parameter("onnx_dl.max_memory_hard", "1GB"))[0].arguments["max_memory"] == 10**9


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("tll", "5m", "onnx_dl.tll is not a parameter. Did you mean ttl?"),
        ("frobnicate", "1", "Known are: onnx_dl.ttl,"),
        ("ttl", "soon", "ttl='soon' is not one of the three modes"),
        ("ttl", "", "ttl='' is not one of the three modes"),
        ("pin", "perhaps", "pin='perhaps' is neither true nor false"),
        ("eager", "2", "eager='2' is neither true nor false"),
        ("priority", "high", "priority='high' is not an integer"),
        ("priority", "9" * 19, "is not an integer of 64 bits"),
        ("latency", "none", "latency='none' is none of"),
        ("max_memory", "lots", "max_memory='lots' is not a size"),
        ("max_runs", "0", "max_runs=0 is not a number of calls"),
        ("group", "", "group='' is not a group name"),
    ],
)
def test_our_parameters_are_checked(name: str, value: str, words: str) -> None:
    with pytest.raises(Refused) as raised:
        understood("\n\n" + parameter(f"onnx_dl.{name}", value))
    assert str(raised.value).startswith(f"{FILE}:3: ")
    assert words in str(raised.value)


def test_a_hard_limit_below_the_soft_one_is_refused() -> None:
    with pytest.raises(Refused, match=r"config\.pbtxt:\d: max_memory_hard='1MB' is less than"):
        understood(parameter("onnx_dl.max_memory", "2MB") + parameter("onnx_dl.max_memory_hard", "1MB"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('name: "other"', "unexpected directory name 'm' for model 'other'"),
        ('platform: "tensorrt_plan"', "the platform is onnxruntime_onnx only, not 'tensorrt_plan'"),
        ('backend: "python"', "the backend is onnxruntime only, not 'python'"),
        ('runtime: "model.py"', "the runtime is onnxruntime only"),
        ("max_batch_size: -1", "'max_batch_size' must be non-negative value"),
        ("sequence_batching { }", "sequence batching is not there"),
        ("ensemble_scheduling { }", "ensembles are not there"),
        ("model_transaction_policy { decoupled: true }", "decoupled models are not there"),
        ("batch_input { kind: BATCH_ELEMENT_COUNT }", "batch inputs are not there"),
        ('model_operations { op_library_filename: "a.so" }', "libraries of operators are not there"),
        ('model_repository_agents { agents { name: "a" } }', "repository agents are not there"),
        ('cc_model_filenames { key: "7.5" value: "a" }', "by compute capability are not there"),
        ('input { name: "x" reshape { shape: [] } }', "reshape is not there"),
        ('input { name: "x" reshape { shape: [3] } }', "reshape is not there"),
        ('input { name: "x" format: FORMAT_NHWC }', "a format changes nothing here"),
        ('input { name: "x" allow_ragged_batch: true }', "ragged batches are not there"),
        ('input { name: "x" is_shape_tensor: true }', "shape tensors are not there"),
        ("input { }", "input 0 has no name"),
        ('input { name: "x" } input { name: "x" }', "the input 'x' is given twice"),
        ('output { name: "y" dims: 0 }', "dims are sizes from 1 on, or -1"),
        ('output { name: "y" dims: -2 }', "dims are sizes from 1 on, or -1"),
        ("version_policy { latest { num_versions: 0 } }", "num_versions is 1 or more"),
        ("version_policy { specific { } }", "specific takes versions from 1 on"),
        ('default_model_filename: "../secret"', "is the name of a file"),
        ('default_model_filename: ".."', "is the name of a file"),
        ("optimization { graph { level: 3 } }", "the graph level is -1 (basic), 0 (all)"),
        (parameter("intra_op_thread_count", "many"), "intra_op_thread_count is from 0 to 4096"),
        (parameter("intra_op_thread_count", "99999999999"), "intra_op_thread_count is from 0 to 4096"),
        (parameter("execution_mode", "2"), "execution_mode is 0 (sequential) or 1 (parallel)"),
        (parameter("enable_mem_arena", "yes"), "enable_mem_arena is 0 or 1"),
        ("instance_group { kind: KIND_CPU gpus: 0 }", "an instance group of KIND_CPU has no gpus"),
        ("instance_group { count: -1 }", "count is a number of instances"),
        ("instance_group { kind: KIND_GPU gpus: -1 }", "gpus are numbers of devices"),
        (
            'optimization { execution_accelerators { gpu_execution_accelerator { name: "magic" } } }',
            "unknown Execution Accelerator 'magic' is requested",
        ),
        ("model_warmup { }", "a warm-up has inputs"),
        ('model_warmup { inputs { key: "x" value { dims: 1 } } }', "one of zero_data, random_data"),
        ('model_warmup { inputs { key: "x" value { zero_data: true } } }', "has no data_type"),
        (
            'model_warmup { inputs { key: "x" value { data_type: TYPE_FP32 input_data_file: "../x" } } }',
            "is the name of a file in the folder warmup",
        ),
    ],
)
def test_what_would_change_results_is_refused_with_its_line(text: str, words: str) -> None:
    with pytest.raises(Refused) as raised:
        understood(f"# a comment\n\n{text}")
    assert str(raised.value).startswith(f"{FILE}:3: ")
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("instance_group { count: 4 }", "count 4 is not there yet"),
        ("instance_group { kind: KIND_GPU gpus: [0, 1] }", "several gpus are not there yet"),
        ("instance_group { } instance_group { }", "several instance groups are not there yet"),
        ("instance_group { kind: KIND_MODEL }", "KIND_MODEL has no effect"),
        ('instance_group { profile: "1" }', "profile has no effect"),
        ("dynamic_batching { }", "dynamic_batching is not there yet"),
        ("dynamic_batching { preferred_batch_size: 4 }", "dynamic_batching is not there yet"),
        ("response_cache { enable: true }", "there is no response cache"),
        ("optimization { cuda { graphs: true } }", "optimization.cuda has no effect"),
        ("optimization { priority: PRIORITY_MAX }", "optimization.priority has no effect"),
        ('metric_tags { key: "a" value: "b" }', "metric tags have no effect"),
        ('output { name: "y" label_filename: "labels.txt" }', "labels have no effect"),
        (
            'optimization { execution_accelerators { gpu_execution_accelerator { name: "tensorrt" } } }',
            "the accelerator tensorrt is not there",
        ),
        (parameter("intra_op_threadcount", "2"), "has no effect. Did you mean intra_op_thread_count?"),
        (parameter("anything", "2"), "the parameter anything is not known and has no effect"),
        (
            "dynamic_batching { default_queue_policy { default_timeout_microseconds: 5 } }",
            "default_timeout_microseconds is not there yet",
        ),
    ],
)
def test_what_changes_no_result_is_told(text: str, words: str) -> None:
    _, source = understood(f"\n{text}")
    (note,) = source.notes
    assert note.startswith(f"{FILE}:2: ")
    assert words in note


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("instance_group { kind: KIND_CPU }", {"providers": ["CPUExecutionProvider"]}),
        ("instance_group { kind: KIND_AUTO }", {}),
        (
            "instance_group { kind: KIND_GPU }",
            {"providers": ["CUDAExecutionProvider", "CPUExecutionProvider"]},
        ),
        (
            "instance_group { gpus: 1 }",
            {"providers": [["CUDAExecutionProvider", {"device_id": "1"}], "CPUExecutionProvider"]},
        ),
        (
            parameter("gpu_mem_limit", "1000") + parameter("arena_extend_strategy", "1"),
            {
                "providers": [
                    [
                        "CUDAExecutionProvider",
                        {"gpu_mem_limit": "1000", "arena_extend_strategy": "kSameAsRequested"},
                    ],
                    "CPUExecutionProvider",
                ]
            },
        ),
        (
            "optimization { graph { level: -1 } }",
            {"options": {"graph_optimization_level": "ORT_ENABLE_BASIC"}},
        ),
        ("optimization { graph { level: 0 } }", {}),
        (
            "optimization { graph { level: 1 } }",
            {"options": {"graph_optimization_level": "ORT_ENABLE_EXTENDED"}},
        ),
        ("optimization { graph { level: 2 } }", {"options": {"graph_optimization_level": "ORT_DISABLE_ALL"}}),
        (
            parameter("intra_op_thread_count", "2")
            + parameter("inter_op_thread_count", "0")
            + parameter("execution_mode", "1")
            + parameter("enable_mem_arena", "0")
            + parameter("session.use_device_allocator_for_initializers", "1"),
            {
                "options": {
                    "intra_op_num_threads": 2,
                    "inter_op_num_threads": 0,
                    "execution_mode": "ORT_PARALLEL",
                    "enable_cpu_mem_arena": False,
                    "config": {"session.use_device_allocator_for_initializers": "1"},
                }
            },
        ),
    ],
)
def test_session_options(text: str, arguments: dict[str, Any]) -> None:
    assert understood(text)[0].arguments == {"ttl": 300.0, **arguments}


def test_the_options_are_those_that_a_worker_makes() -> None:
    from onnx_dl.ort.options import make_session_options

    text = parameter("intra_op_thread_count", "2") + parameter("session.intra_op.allow_spinning", "0")
    plain = understood(text + "optimization { graph { level: 1 } }")[0].arguments["options"]
    made = make_session_options(plain)
    assert made is not None
    assert made.intra_op_num_threads == 2
    assert made.graph_optimization_level.name == "ORT_ENABLE_EXTENDED"
    assert made.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_a_queue() -> None:
    found, source = understood("dynamic_batching { default_queue_policy { max_queue_size: 9 } }")
    assert found.max_queue_size == 9
    assert not source.notes


# --- with the model ---------------------------------------------------------------------------------------


def test_everything_is_completed() -> None:
    found = completion.complete("m", "model.onnx", MODEL, Configuration())
    assert [each.name for each in found.inputs] == ["x", "s"]
    assert found.config["name"] == "m"
    assert found.config["platform"] == "onnxruntime_onnx"
    assert found.config["backend"] == "onnxruntime"
    assert found.config["max_batch_size"] == 0
    assert found.config["version_policy"] == {"latest": {"num_versions": 1}}
    assert found.config["default_model_filename"] == "model.onnx"
    assert found.config["instance_group"][0]["kind"] == "KIND_AUTO"
    assert [(each["name"], each["data_type"], each["dims"]) for each in found.config["input"]] == [
        ("x", "TYPE_FP32", [-1, 3]),
        ("s", "TYPE_STRING", [-1, 1]),
    ]
    assert [(each["name"], each["dims"]) for each in found.config["output"]] == [("y", [-1, 2]), ("z", [-1])]


def test_with_a_batch_dims_lack_it() -> None:
    found = complete(
        'max_batch_size: 8 input { name: "x" data_type: TYPE_FP32 dims: 3 } input { name: "s" }'
        'output { name: "y" dims: [ 2 ] }'
    )
    assert [each["dims"] for each in found.config["input"]] == [[3], [1]]
    assert found.inputs[0].shape == (-1, 3)
    assert [each.name for each in found.outputs] == ["y"]


def test_sizes_that_the_model_leaves_free_may_be_fixed() -> None:
    found = complete('input { name: "x" dims: [ 5, 3 ] } input { name: "s" }')
    assert found.inputs[0].shape == (5, 3)


def test_an_initializer_may_be_an_optional_input() -> None:
    found = complete('input { name: "x" } input { name: "s" } input { name: "w" optional: true dims: 3 }')
    assert [(each.name, each.is_optional) for each in found.inputs] == [
        ("x", False),
        ("s", False),
        ("w", True),
    ]
    assert found.config["input"][2]["optional"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('input { name: "X" }', "unexpected inference input 'X', allowed inputs are: x, s"),
        ('output { name: "q" }', "unexpected inference output 'q', allowed outputs are: y, z"),
        ('input { name: "x" }', "the model has inputs that the configuration lacks: s"),
        ('input { name: "x" data_type: TYPE_FP64 } input { name: "s" }', "'x' is FP32 in the model, FP64 in"),
        ('output { name: "y" dims: [ -1, 4 ] }', "expects shape [-1, 2] but the configuration specifies"),
        ('output { name: "y" dims: [ -1, -1 ] }', "expects shape [-1, 2] but the configuration specifies"),
        ('output { name: "y" dims: 2 }', "expects 2 dimensions (shape [-1, 2]) but the configuration"),
        ('input { name: "x" optional: true } input { name: "s" }', "has no default in the model"),
    ],
)
def test_contradictions_are_refused_with_their_line(text: str, words: str) -> None:
    with pytest.raises(Refused) as raised:
        complete(f"\n{text}")
    assert str(raised.value).startswith(f"{FILE}:2: ")
    assert words in str(raised.value)


def test_a_batch_needs_a_free_first_size() -> None:
    fixed = ModelSignature((TensorInfo("x", "FP32", (1, 3)),), (TensorInfo("y", "FP32", (-1,)),))
    with pytest.raises(Refused, match="the first dimension must be -1; but shape expected by the model"):
        complete("max_batch_size: 4", fixed)
    scalar = ModelSignature((TensorInfo("x", "FP32", (-1, 3)),), (TensorInfo("y", "FP32", ()),))
    with pytest.raises(Refused, match="at least 1 dimension"):
        complete("max_batch_size: 4", scalar)
    unranked = ModelSignature((TensorInfo("x", "FP32", (), is_unranked=True),), MODEL.outputs)
    assert complete("max_batch_size: 4", unranked).inputs[0].is_unranked


def test_outputs_that_are_no_tensors_may_be_left_out() -> None:
    classes = ModelSignature(
        MODEL.inputs,
        MODEL.outputs,
        problems={"p": "its output 'p' is a sequence: the protocol has tensors only"},
    )
    assert complete("", classes).outputs == MODEL.outputs
    with pytest.raises(Unservable, match="its output 'p' is a sequence"):
        complete("", ModelSignature(MODEL.inputs, problems=classes.problems))
    with pytest.raises(Unservable, match="its output 'p' is a sequence"):
        complete('output { name: "p" }', classes)
    assert [each.name for each in complete('output { name: "y" }', classes).outputs] == ["y"]


def test_json_has_no_lines() -> None:
    source = Source.of_json('{"max_batch_size":"16"}', "the config parameter for 'm'")
    found = config.understood(source, "m")
    assert completion.complete("m", "model.onnx", MODEL, found, source).config["max_batch_size"] == 16
    with pytest.raises(Refused, match=r"^the config parameter for 'm': max_batch is not a field here"):
        Source.of_json('{"max_batch": 1}', "the config parameter for 'm'")
    with pytest.raises(Refused, match=r"^the config parameter for 'm' is not JSON"):
        Source.of_json("{", "the config parameter for 'm'")
    deep = '{"a":' * 2000 + "1" + "}" * 2000
    with pytest.raises(Refused):
        Source.of_json(deep, "the config parameter for 'm'")
