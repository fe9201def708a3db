"""onnxruntime's value objects by their parts."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto

from onnx_dl.errors import UnsupportedValueError
from onnx_dl.ort import onnx_builder, ortvalues
from onnx_dl.ort.ortvalues import Parts

C = onnxruntime.capi.onnxruntime_pybind11_state
DENSE = [n for n in TensorProto.DataType.values() if n not in (0, 8, 14, 15)]


def again(value: Any, *, copy: bool = True) -> Any:
    """The value, taken apart and put together."""

    def made(part: Any) -> Any:
        if not isinstance(part, Parts):
            return part
        return ortvalues.put_together(part.kind, [made(item) for item in part.items], copy=copy)

    parts = ortvalues.take_apart(value)
    assert parts is not None
    return made(parts)


def raw(value: Any) -> bytes:
    return ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("kind", DENSE, ids=TensorProto.DataType.Name)
def test_every_element_type(kind: int, copy: bool) -> None:
    for shape in ([3, 5], [], [0, 2]):
        try:
            value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, kind)
        except RuntimeError as error:
            pytest.skip(f"this onnxruntime has no such tensors: {error}")
        nbytes = value.tensor_size_in_bytes()
        ctypes.memmove(value.data_ptr(), bytes(range(nbytes)), nbytes)
        parts = ortvalues.take_apart(value)
        got = again(value, copy=copy)
        assert type(got) is onnxruntime.OrtValue
        assert (got.data_type(), got.shape(), raw(got)) == (value.data_type(), value.shape(), raw(value))
        assert parts is not None


def test_parts_keep_what_they_lie_in() -> None:
    parts = ortvalues.take_apart(onnxruntime.OrtValue.ortvalue_from_numpy(np.arange(100_000.0)))
    gc.collect()
    kept = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(100_000))  # would lie there, if it were free
    assert parts is not None
    assert parts.items[0].items[2].view(np.float64).sum() == np.arange(100_000.0).sum()
    assert kept.shape() == [100_000]


@pytest.mark.parametrize(
    "array",
    [np.array(["ä", "", "x" * 500], object), np.array([["a", "b"]], object), np.array("one", object)],
    ids=lambda a: str(a.shape),
)
def test_text(array: np.ndarray) -> None:
    got = again(onnxruntime.OrtValue(onnx_builder.text(array)))
    assert (got.data_type(), got.numpy().tolist()) == ("tensor(string)", array.tolist())


@pytest.mark.parametrize(
    ("kind", "items"),
    [
        ("seq(tensor(float))", [np.ones(2, np.float32), np.array(3, np.float32)]),
        ("seq(tensor(int64))", []),
        ("seq(tensor(string))", [np.array(["a"], object), np.array([], object)]),
        ("seq(tensor(bool))", [np.array([True, False])]),
        ("seq(tensor(double))", [np.zeros((2, 0))]),
    ],
)
def test_sequences(kind: str, items: list[np.ndarray]) -> None:
    got = again(onnxruntime.OrtValue(onnx_builder.sequence(kind, items)))
    assert (got.data_type(), got.is_tensor_sequence()) == (kind, True)
    found = onnx_builder.read(got._ortvalue)
    assert [(a.shape, a.tolist()) for a in found] == [(a.shape, a.tolist()) for a in items]


@pytest.mark.parametrize("content", [[{"a": 0.5, "b": 1.0}], [{0: 1.0, 7: 2.0}, {0: 3.0, 7: 4.0}]], ids=str)
def test_maps(content: list[dict]) -> None:
    kind = "string" if isinstance(next(iter(content[0])), str) else "int64"
    got = again(onnxruntime.OrtValue(onnx_builder.maps(f"seq(map({kind},tensor(float)))", content)))
    assert got.data_type().startswith("seq(map(")
    assert onnx_builder.read(got._ortvalue) == content


@pytest.mark.parametrize("kind", ["string", "int64"])
def test_maps_of_no_rows(kind: str) -> None:
    got = again(onnxruntime.OrtValue(onnx_builder.maps(f"seq(map({kind},tensor(float)))", [])))
    assert (got.data_type(), onnx_builder.read(got._ortvalue)) == (f"seq(map({kind},tensor(float)))", [])


def test_an_absent_optional() -> None:
    assert not again(onnxruntime.OrtValue(onnx_builder.absent())).has_value()


CPU = onnxruntime.OrtDevice.make("cpu", 0)
ONES = np.ones(2, np.float32)
SPARSE = {
    "coo": lambda: onnxruntime.SparseTensor.sparse_coo_from_numpy(
        np.array([3, 3]), ONES, np.array([0, 4]), CPU
    ),
    "coo 2-D": lambda: onnxruntime.SparseTensor.sparse_coo_from_numpy(
        np.array([3, 3]), ONES, np.array([[0, 0], [1, 1]]), CPU
    ),
    "csr": lambda: onnxruntime.SparseTensor.sparse_csr_from_numpy(
        np.array([3, 3]), ONES, np.array([0, 1]), np.array([0, 1, 2, 2]), CPU
    ),
}


@pytest.mark.parametrize("wrap", [None, onnxruntime.OrtValue.ort_value_from_sparse_tensor])
@pytest.mark.parametrize("kind", SPARSE)
def test_sparse(kind: str, wrap: Any) -> None:
    given = SPARSE[kind]()
    got = again(given if wrap is None else wrap(SPARSE[kind]()))
    if wrap is not None:
        assert got.is_sparse_tensor()
        got = got.as_sparse_tensor()
    assert type(got) is onnxruntime.SparseTensor
    assert (got.values().tolist(), list(got.dense_shape())) == ([1, 1], [3, 3])
    assert got.format() == given.format()
    if kind == "csr":
        view = got.as_csrc_view()
        assert (view.inner().tolist(), view.outer().tolist()) == ([0, 1], [0, 1, 2, 2])
    else:
        assert got.as_coo_view().indices().tolist() == given.as_coo_view().indices().tolist()


def test_native_values_stay_native() -> None:
    value = onnxruntime.OrtValue.ortvalue_from_numpy(ONES)
    assert type(again(value._ortvalue)) is C.OrtValue
    assert type(again(SPARSE["coo"]()._get_c_tensor())) is C.SparseTensor


def test_other_values_are_left_alone() -> None:
    for value in (1, "x", ONES, [ONES], object()):
        assert ortvalues.take_apart(value) is None


@pytest.mark.parametrize(
    "act",
    [
        lambda: onnx_builder.sequence("seq(tensor(nonsense))", []),
        lambda: onnx_builder.maps("seq(map(string,tensor(double)))", []),
        lambda: onnx_builder.maps("seq(map(string,tensor(float)))", [{"a": 1.0}, {"b": 1.0}]),
    ],
)
def test_what_cannot_be_made(act: Any) -> None:
    with pytest.raises(UnsupportedValueError, match="cannot be sent"):
        act()


def test_unknown_kinds() -> None:
    with pytest.raises(LookupError):
        ortvalues.put_together("nonsense", [], copy=True)
