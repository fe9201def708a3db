"""Rules of the load cache: which models it takes, in which form, and under which key."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from onnx_dl.workers.load_cache import rules
from onnx_dl.workers.load_cache.rules import SavedForm
from tests.support.builders import spec

CUDA = ["CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, SavedForm.OPTIMIZED),
        (
            {"options": {"config": {}, "enable_profiling": False, "intra_op_num_threads": 2}},
            SavedForm.OPTIMIZED,
        ),
        ({"options": {"config": {"session.intra_op.allow_spinning": "0"}}}, SavedForm.OPTIMIZED),
        ({"providers": ["CPUExecutionProvider"]}, SavedForm.OPTIMIZED),
        (
            {"providers": [["CPUExecutionProvider", {"arena_extend_strategy": "kSameAsRequested"}]]},
            SavedForm.OPTIMIZED,
        ),
        ({"extra": {"enable_fallback": 0}}, SavedForm.OPTIMIZED),
        ({"options": {"enable_profiling": True}}, None),
        ({"options": {"optimized_model_filepath": "o.onnx"}}, None),
        ({"options": {"config": {"session.disable_prepacking": "1"}}}, None),
        ({"options": {"config": {"nobody.knows": "1"}}}, None),
        ({"extra": {"disabled_optimizers": ["ConstantFolding"]}}, None),
        ({"providers": CUDA}, SavedForm.EXTERNAL),
        ({"providers": ["CUDAExecutionProvider"]}, SavedForm.EXTERNAL),
        (
            {"providers": [["CUDAExecutionProvider", {"device_id": "1", "prefer_nhwc": "1"}]]},
            SavedForm.EXTERNAL,
        ),
        ({"providers": CUDA, "options": {"config": {"session.disable_prepacking": "1"}}}, SavedForm.EXTERNAL),
        ({"providers": CUDA, "options": {"config": {"session.load_model_format": "ORT"}}}, None),
        ({"providers": CUDA, "options": {"enable_profiling": True}}, None),
        ({"providers": CUDA, "options": {"calls": [["register_custom_ops_library", ["l.so"], {}]]}}, None),
        ({"providers": CUDA, "sandbox": True}, None),
        ({"providers": ["TensorrtExecutionProvider", *CUDA]}, None),
        ({"providers": ["OpenVINOExecutionProvider"]}, None),
    ],
)
def test_what_may_be_cached(fields: dict, expected: SavedForm | None):
    assert rules.form_of(spec(**fields)) is expected


def test_a_form_is_made_of_sessions_that_gain_by_it():
    """CUDA that was asked for may be missing."""
    assert SavedForm.OPTIMIZED.serves(CUDA[1:]) and not SavedForm.OPTIMIZED.serves(CUDA)
    assert SavedForm.EXTERNAL.serves(CUDA) and not SavedForm.EXTERNAL.serves(CUDA[1:])
    assert not SavedForm.EXTERNAL.serves(["TensorrtExecutionProvider", *CUDA])


def test_files_in_the_temporary_folder_will_hardly_be_there_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    inside = msgspec.structs.replace(spec(), path=str(tmp_path / "tmp" / "a" / "m.onnx"))
    beside = msgspec.structs.replace(spec(), path=str(tmp_path / "tmpfile.onnx"))
    given = msgspec.structs.replace(spec(), path=None, blob="digest")
    assert [rules.is_temporary(model) for model in (inside, beside, given)] == [True, False, False]


def test_ort_files_are_loaded_as_they_are():
    assert rules.form_of(msgspec.structs.replace(spec(), path="m.ort")) is None


def test_key_tells_files_options_and_versions_apart(tmp_path: Path):
    file = tmp_path / "m.onnx"
    file.write_bytes(b"1")
    model = msgspec.structs.replace(spec(), path=str(file))
    key = rules.key_of(model, "1.31")
    assert rules.key_of(model, "1.31") == key
    other = msgspec.structs.replace(model, options={"config": {}, "intra_op_num_threads": 3})
    assert len({key, rules.key_of(model, "1.32"), rules.key_of(other, "1.31")}) == 3
    file.write_bytes(b"22")
    assert rules.key_of(model, "1.31") != key


def test_key_of_the_external_form_is_of_the_model_alone(tmp_path: Path):
    """All devices, options and versions share one entry; a model for the CPU has another."""
    file = tmp_path / "m.onnx"
    file.write_bytes(b"1")
    model = msgspec.structs.replace(spec(providers=CUDA), path=str(file))
    key = rules.key_of(model, "1.31")
    other = msgspec.structs.replace(
        model,
        providers=[["CUDAExecutionProvider", {"device_id": "1"}], "CPUExecutionProvider"],
        options={"config": {}, "graph_optimization_level": "ORT_DISABLE_ALL"},
    )
    assert rules.key_of(other, "1.32") == key
    assert rules.key_of(msgspec.structs.replace(model, providers=CUDA[1:]), "1.31") != key
    assert rules.key_of(msgspec.structs.replace(model, sha256={"": "0" * 64}), "1.31") != key
    file.write_bytes(b"22")
    assert rules.key_of(model, "1.31") != key


def test_the_external_form_is_loaded_as_the_model_itself():
    model = spec(providers=CUDA, options={"config": {}, "graph_optimization_level": "ORT_ENABLE_BASIC"})
    loading = rules.loading(model, "/c/model.onnx")
    assert loading == msgspec.structs.replace(model, path="/c/model.onnx", blob=None)


def test_saved_form_is_loaded_with_the_users_options():
    model = spec(options={"config": {"session.intra_op.allow_spinning": "0"}, "intra_op_num_threads": 3})
    saving = rules.saving(model, "/c/model.onnx", "w.bin")
    assert saving.options["optimized_model_filepath"] == "/c/model.onnx"
    assert saving.options["config"]["session.intra_op.allow_spinning"] == "0"
    loading = rules.loading(model, "/c/model.onnx")
    assert loading.path == "/c/model.onnx"
    assert loading.options == {**model.options, "graph_optimization_level": "ORT_DISABLE_ALL"}
    assert "graph_optimization_level" not in model.options


def test_providers_that_compile_keep_what_they_compiled(tmp_path: Path):
    before = spec(
        providers=[
            "TensorrtExecutionProvider",
            ["OpenVINOExecutionProvider", {"x": 1}],
            "CPUExecutionProvider",
        ]
    )
    after = rules.with_engine_caches(before, tmp_path).providers
    assert after[0][1]["trt_engine_cache_enable"] == "True"
    assert after[0][1]["trt_engine_cache_path"].startswith(str(tmp_path))
    assert after[1][1]["x"] == 1 and after[1][1]["cache_dir"].startswith(str(tmp_path))
    assert after[2] == ["CPUExecutionProvider", {}]


def test_users_own_engine_cache_stays(tmp_path: Path):
    for fields in (
        {"providers": [["TensorrtExecutionProvider", {"trt_engine_cache_enable": "False"}]]},
        {"providers": ["TensorrtExecutionProvider"], "provider_options": [{"trt_timing_cache_enable": "1"}]},
        {"providers": ["CPUExecutionProvider"]},
        {},
    ):
        before = spec(**fields)
        assert rules.with_engine_caches(before, tmp_path) == before
