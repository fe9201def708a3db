"""Every kind of value, in and out: what is taken, what comes back, and how the rest is refused."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.contract.both import (
    CPU,
    DTYPES,
    I64,
    IA,
    STR,
    C,
    F,
    Make,
    equal,
    identity,
    mapping,
    maps,
    model,
    node,
    ones,
    optional,
    ortvalue,
    own,
    raised,
    scaled,
    sequence,
    tensor,
)

pytestmark = pytest.mark.slow

Fail, InvalidArgument = C.Fail, C.InvalidArgument


def echo(make: Make, kind: int, value: Any) -> Any:
    return make(identity(kind)).run(None, {"x": value})[0]


# --- dense -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_in_every_shape(make: Make, code: str) -> None:
    session = make(identity(DTYPES[code]))
    for shape in [(), (1,), (0,), (3, 0, 2), (2, 3), (1,) * 20, (2,) * 9, (40_000,)]:
        data = np.asarray(np.arange(np.prod(shape)).reshape(shape) % 2).astype(code)
        (result,) = session.run(None, {"x": data})
        equal(result, data)
        own(result)
        assert not np.shares_memory(result, data)


def layouts() -> dict[str, np.ndarray]:
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    read_only = base.copy()
    read_only.flags.writeable = False
    return {
        "strided": base[::2, ::-1],
        "transposed": base.T,
        "Fortran": np.asfortranarray(base),
        "broadcast": np.broadcast_to(base[0], (3, 6)),
        "unaligned": np.frombuffer(b"\0" + base.tobytes(), np.uint8)[1:].view(np.float32).reshape(4, 6),
        "read-only": read_only,
        "subclass": base.view(type("Sub", (np.ndarray,), {})),
        "matrix": base.view(np.recarray),
    }


@pytest.mark.parametrize("layout", layouts())
def test_memory_layouts(make: Make, layout: str) -> None:
    data = layouts()[layout]
    result = echo(make, F, data)
    assert np.array_equal(result, np.asarray(data))
    own(result)


def test_a_mask_is_dropped(make: Make) -> None:
    assert echo(make, F, np.ma.masked_array(ones(3), [0, 1, 0])).tolist() == [1, 1, 1]


def test_the_other_byte_order_is_misread(make: Make) -> None:
    data = np.arange(4).astype(">f4")
    assert echo(make, F, data).tobytes() == data.tobytes()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([], []),
        ([1.0], [1]),
        ([1, True], [1, 1]),
        ([[1.0, 2.0], [3.0, 4.0]], [[1, 2], [3, 4]]),
        ([np.float32(3)], [3]),
        ([ones(2), ones(2)], [[1, 1], [1, 1]]),
    ],
    ids=repr,
)
def test_lists_are_arrays(make: Make, value: list, expected: list) -> None:
    result = echo(make, F, value)
    assert result.dtype == np.float32
    assert result.tolist() == expected


class Arrayish:
    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return ones(2)


DIGEST = "Input must be a list of dictionaries or a single numpy array for input 'x'."
NOT_DENSE: dict[str, tuple[Any, type, str]] = {
    "double": (np.ones(2), InvalidArgument, "Actual: (tensor(double)) , expected: (tensor(float))"),
    "half": (
        np.ones(2, np.float16),
        InvalidArgument,
        "Actual: (tensor(float16)) , expected: (tensor(float))",
    ),
    "text": (np.array(["a"]), InvalidArgument, "Actual: (tensor(string)) , expected: (tensor(float))"),
    "objects": (np.array([1.0], object), InvalidArgument, "Actual: (tensor(string)) , expected"),
    "records": (np.zeros(2, [("a", "f4")]), InvalidArgument, "Actual: (tensor(string)) , expected"),
    "complex": (np.ones(2, np.complex64), RuntimeError, "Numpy_type 14 can't be converted to MLDataType."),
    "datetime": (
        np.array(["2026"], "M8[D]"),
        RuntimeError,
        "Numpy_type 21 can't be converted to MLDataType.",
    ),
    "long double": (np.ones(2, np.longdouble), RuntimeError, "Numpy_type 13 can't be converted"),
    "float": (1.0, RuntimeError, "Unable to handle object of type <class 'float'>"),
    "int": (1, RuntimeError, "Unable to handle object of type <class 'int'>"),
    "numpy scalar": (np.float32(1), RuntimeError, "Unable to handle object of type <class 'numpy.float32'>"),
    "arrayish": (Arrayish(), RuntimeError, "Unable to handle object of type <class 'tests."),
    "memoryview": (memoryview(ones(2)), RuntimeError, DIGEST),
    "tuple": ((1.0,), RuntimeError, DIGEST),
    "str": ("text", RuntimeError, DIGEST),
    "bytes": (b"bytes", RuntimeError, DIGEST),
    "bytearray": (bytearray(b"a"), RuntimeError, DIGEST),
    "set": ({1.0}, RuntimeError, DIGEST),
    "range": (range(2), RuntimeError, DIGEST),
    "ragged": ([[1.0], [2.0, 3.0]], RuntimeError, "Could not create tensor from given input list"),
    "list of str": (["a"], RuntimeError, "Could not create tensor from given input list"),
    "{}": ({}, RuntimeError, "Size of dictionary is empty, unable to run the prediction."),
    "dict": (
        {"a": 1.0},
        InvalidArgument,
        "Actual: ((map(string,tensor(float)))) , expected: ((tensor(float)))",
    ),
    "None": (None, Fail, "Non-zero status code returned while running Identity node."),
    "C.OrtValue": (ortvalue(ones(2))._ortvalue, RuntimeError, "Unable to handle object of type <class"),
}


@pytest.mark.parametrize("what", NOT_DENSE)
def test_values_that_a_dense_input_refuses(make: Make, what: str) -> None:
    value, error, phrase = NOT_DENSE[what]
    session = make(identity())
    make.refuses(session, lambda s: s.run(None, {"x": value}), error, phrase)
    assert session.run(None, {"x": ones(2)})[0].tolist() == [1, 1]


def test_arrays_of_ml_dtypes_are_refused(make: Make) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    data = np.ones(2, ml_dtypes.bfloat16)
    session = make(identity(TensorProto.BFLOAT16))
    make.refuses(
        session, lambda s: s.run(None, {"x": data}), RuntimeError, "can't be converted to MLDataType."
    )


def test_shapes_that_are_refused(make: Make) -> None:
    session = make(identity(F, [2, 3]))
    rank = (
        IA + "Invalid rank for input: x Got: 1 Expected: 2 Please fix either the inputs/outputs or the model."
    )
    make.refuses(session, lambda s: s.run(None, {"x": ones(3)}), InvalidArgument, rank)
    one = IA + "Got invalid dimensions for input: x for the following indices\n index: 1 Got: 4 Expected: 3\n"
    make.refuses(session, lambda s: s.run(None, {"x": ones(2, 4)}), InvalidArgument, one)
    both = " index: 0 Got: 5 Expected: 2\n index: 1 Got: 4 Expected: 3\n Please fix either"
    make.refuses(session, lambda s: s.run(None, {"x": ones(5, 4)}), InvalidArgument, both)


def test_any_rank_is_taken_where_a_scalar_is_declared(make: Make) -> None:
    session = make(model([node("Neg", ["x"], ["y"])], [tensor("x", F, [])], [tensor("y", F, [])]))
    for shape in [(), (1,), (2,), (1, 1)]:
        (result,) = session.run(None, {"x": ones(*shape)})
        assert result.shape == shape


def test_results_are_the_callers_own(make: Make) -> None:
    session = make(scaled())
    data = ones(200, 300)
    first, second = session.run(None, {"x": data})
    third, fourth = session.run(None, {"x": data})
    arrays = [data, first, second, third, fourth]
    for i, one in enumerate(arrays):
        own(one) if i else None
        for other in arrays[:i]:
            assert not np.shares_memory(one, other)
    first[:] = 7
    assert third[0, 0] == 2
    del session
    gc.collect()
    assert first[-1, -1] == 7 and second[-1, -1] == 2


def test_a_name_asked_for_twice_is_one_memory(make: Make) -> None:
    first, second, other = make(scaled()).run(["twice", "twice", "more"], {"x": ones(2, 2)})
    assert first is not second
    first[0, 0] = 9
    assert second[0, 0] == 9 and other[0, 0] == 2


# --- text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.array(["ä", "", "long " * 50]), ["ä", "", "long " * 50]),
        (np.array([b"ab", b"\xc3\xa4"], "S8"), ["ab", "ä"]),
        (np.array([1, None, 2.5, b"a"], object), ["1", "None", "2.5", "b'a'"]),
        (np.array([b"ab", b"c"], "V3"), ["ab\0", "c\0\0"]),
        (np.array([["a"], ["b"]], object), [["a"], ["b"]]),
        (np.array("scalar", object), "scalar"),
        (np.array([], object), []),
        (np.array(["a\0b"], object), ["a\0b"]),
        (np.array(["a\0b"]), ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1], ["1"]),
        (np.array(["x" * 200_000], object), ["x" * 200_000]),
    ],
    ids=lambda v: repr(v)[:30],
)
def test_text(make: Make, value: Any, expected: Any) -> None:
    result = echo(make, STR, value)
    assert result.dtype == object
    assert result.tolist() == expected
    assert result.flags.writeable


@pytest.mark.parametrize(
    ("value", "error", "phrase"),
    [
        (np.array([b"\xff"], "S4"), UnicodeDecodeError, "can't decode byte 0xff in position 0"),
        (np.array(["\ud800"]), Fail, "<class 'UnicodeEncodeError'>: 'utf-8' codec can't encode"),
        (np.array(["\ud800"], object), UnicodeEncodeError, "surrogates not allowed"),
        (ones(2), InvalidArgument, IA + "Unexpected input data type. Actual: (tensor(float)) , expected:"),
    ],
    ids=["bytes", "surrogate", "surrogate object", "numbers"],
)
def test_text_that_is_refused(make: Make, value: np.ndarray, error: type, phrase: str) -> None:
    make.refuses(make(identity(STR)), lambda s: s.run(None, {"x": value}), error, phrase)


# --- narrow types ------------------------------------------------------------------------------------------

NARROW = {"BFLOAT16": (2, 17), "FLOAT8E4M3FN": (1, 21), "FLOAT8E4M3FNUZ": (1, 21), "FLOAT8E5M2": (1, 21),
          "FLOAT8E5M2FNUZ": (1, 21)}  # fmt: skip


def narrow(name: str, data: bytes) -> onnxruntime.OrtValue:
    raw = np.frombuffer(data, np.uint16 if name == "BFLOAT16" else np.uint8).copy()
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, getattr(TensorProto, name))


@pytest.mark.parametrize("name", NARROW)
def test_narrow_types(make: Make, name: str) -> None:
    width, opset = NARROW[name]
    data = bytes(range(0x30, 0x30 + 4 * width))
    session = make(identity(getattr(TensorProto, name), [4], opset=opset, ir=10 if opset > 20 else 8))
    value = narrow(name, data)
    (result,) = session.run_with_ort_values(None, {"x": value})
    assert (result.data_type(), result.shape()) == (value.data_type(), [4])
    assert result.element_type() == getattr(TensorProto, name)
    assert ctypes.string_at(result.data_ptr(), result.tensor_size_in_bytes()) == data
    if name == "FLOAT8E4M3FN":
        equal(session.run(None, {"x": value})[0], np.frombuffer(data, np.uint8))
    else:
        phrase = "No corresponding Numpy type for Tensor Type. "
        make.refuses(session, lambda s: s.run(None, {"x": value}), RuntimeError, phrase)
    make.refuses(
        session, lambda s: s.run(None, {"x": np.ones(4, np.uint8)}), InvalidArgument, "tensor(uint8)"
    )


@pytest.mark.parametrize("name", ["INT4", "UINT4"])
def test_four_bit_types(make: Make, name: str) -> None:
    """Two to a byte, in (DequantizeLinear) and out (QuantizeLinear)."""
    kind = getattr(TensorProto, name)
    one = helper.make_tensor("one", F, [], [1.0])
    zero = helper.make_tensor("zero", kind, [], [0])
    nodes = [
        node("DequantizeLinear", ["x", "one"], ["y"]),
        node("QuantizeLinear", ["y", "one", "zero"], ["z"]),
    ]
    ends = [tensor("y", F, [4]), tensor("z", kind, [4])]
    session = make(model(nodes, [tensor("x", kind, [4])], ends, [one, zero], opset=21, ir=10))
    value = onnxruntime.OrtValue.ortvalue_from_shape_and_type([4], kind)
    ctypes.memmove(value.data_ptr(), b"\x21\x43", 2)
    y, z = session.run_with_ort_values(None, {"x": value})
    assert y.numpy().tolist() == [1, 2, 3, 4]
    assert (z.data_type(), z.shape(), z.element_type()) == (f"tensor({name.lower()})", [4], kind)
    assert ctypes.string_at(z.data_ptr(), 2) == b"\x21\x43"
    equal(session.run(["y"], {"x": value})[0], y.numpy())
    phrase = "No corresponding Numpy type for Tensor Type. "
    make.refuses(session, lambda s: s.run(None, {"x": value}), RuntimeError, phrase)


# --- sequences ---------------------------------------------------------------------------------------------


def same_sequence(kind: int = F) -> bytes:
    return model([node("Identity", ["x"], ["y"])], [sequence("x", kind)], [sequence("y", kind)])


@pytest.mark.parametrize(
    ("element", "items"),
    [
        (F, [ones(2), np.zeros((0, 3), np.float32), np.array(5, np.float32)]),
        (F, []),
        (F, [np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))]),
        (I64, [np.arange(20_000)]),
        (STR, [np.array(["a", "ä"], object), np.array([], object)]),
        (STR, []),
    ],
    ids=["floats", "empty", "Fortran", "large", "text", "empty text"],
)
def test_sequences(make: Make, element: int, items: list) -> None:
    (result,) = make(same_sequence(element)).run(None, {"x": items})
    equal(result, [np.ascontiguousarray(i).reshape(i.shape) for i in items])
    assert all(array.flags.writeable for array in result)


def test_sequences_made_and_read_in_the_model(make: Make) -> None:
    built = [node("SequenceConstruct", ["a", "b"], ["y"]), node("SequenceEmpty", [], ["none"], dtype=F)]
    ends = [sequence("y"), sequence("none")]
    result = make(model(built, [tensor("a"), tensor("b")], ends)).run(None, {"a": ones(2), "b": ones(1, 2)})
    equal(result, [[ones(2), ones(1, 2)], []])
    source = model(
        [node("SequenceAt", ["x", "i"], ["y"])], [sequence("x"), tensor("i", I64, [])], [tensor("y")]
    )
    session = make(source)
    feed = {"x": [ones(2), ones(3)], "i": np.array(1)}
    equal(session.run(None, feed), [ones(3)])
    feed["i"] = np.array(7)
    phrase = "Invalid sequence index (7) specified for sequence of size (2)"
    make.refuses(session, lambda s: s.run(None, feed), InvalidArgument, phrase)


ITERABLE = "Iterable of <class 'numpy.ndarray'> should be given as array for input 'x'."


@pytest.mark.parametrize(
    ("value", "error", "phrase"),
    [
        ((ones(2),), RuntimeError, ITERABLE),
        ([1.0], RuntimeError, "CreateSequenceOfTensors: Input is not a tensor"),
        ([ones(2), "a"], RuntimeError, "CreateSequenceOfTensors: Input is not a tensor"),
        ([[1.0]], RuntimeError, "CreateSequenceOfTensors: Input is not a tensor"),
        ([np.ones(2)], RuntimeError, "TensorSeq: tensor to be added has a different data type."),
        (
            ones(2),
            InvalidArgument,
            IA + "input with name: 'x' expected to be of type: 3 but received a tensor",
        ),
        (None, Fail, "Trying to get a TensorSeq, but got: (null)"),
    ],
    ids=["tuple", "number", "text", "list", "double", "array", "None"],
)
def test_sequences_that_are_refused(make: Make, value: Any, error: type, phrase: str) -> None:
    make.refuses(make(same_sequence()), lambda s: s.run(None, {"x": value}), error, phrase)


# --- optionals ---------------------------------------------------------------------------------------------


def same_optional(of_sequence: bool = False) -> bytes:
    ends = [optional("x", F, of_sequence)], [optional("y", F, of_sequence)]
    return model([node("Identity", ["x"], ["y"])], *ends)


def test_optionals(make: Make) -> None:
    session = make(same_optional())
    equal(session.run(None, {"x": ones(2)}), [ones(2)])
    equal(session.run(None, {"x": [1.0]}), [ones(1)])
    assert session.run(None, {}) == session.run(None, {"x": None}) == [None]
    phrase = IA + "Unexpected input data type. Actual: (tensor(double)) , expected: (tensor(float))"
    make.refuses(session, lambda s: s.run(None, {"x": np.ones(2)}), InvalidArgument, phrase)


def test_optional_sequences(make: Make) -> None:
    session = make(same_optional(of_sequence=True))
    equal(session.run(None, {"x": [ones(2)]}), [[ones(2)]])
    equal(session.run(None, {"x": []}), [[]])
    assert session.run(None, {}) == session.run(None, {"x": None}) == [None]


def test_what_a_model_asks_of_an_optional(make: Make) -> None:
    has = node("OptionalHasElement", ["x"], ["y"])
    session = make(model([has], [optional("x")], [tensor("y", TensorProto.BOOL, [])], opset=18))
    for feed, expected in [({"x": ones(2)}, True), ({}, False), ({"x": None}, False)]:
        equal(session.run(None, feed), [np.array(expected)])
    session = make(
        model([node("OptionalGetElement", ["x"], ["y"])], [optional("x")], [tensor("y")], opset=18)
    )
    equal(session.run(None, {"x": ones(2)}), [ones(2)])
    phrase = "Trying to use OptionalGetElement on an optional type OrtValue which contains no data"
    make.refuses(session, lambda s: s.run(None, {}), InvalidArgument, phrase)


# --- maps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "key"), [({"classlabels_int64s": [3, 5]}, I64), ({"classlabels_strings": ["a", "ä"]}, STR)]
)
def test_zip_map(make: Make, labels: dict, key: int) -> None:
    zipped = node("ZipMap", ["x"], ["y"], domain="ai.onnx.ml", **labels)
    session = make(model([zipped], [tensor("x", F, ["N", 2])], [maps("y", key)]))
    (names,) = labels.values()
    data = np.array([[1, 2], [3, 4]], np.float32)
    equal(session.run(None, {"x": data}), [[dict(zip(names, row, strict=True)) for row in data.tolist()]])
    assert session.run(None, {"x": data[:0]}) == [[]]


def vectorizer() -> bytes:
    of = node("DictVectorizer", ["x"], ["y"], domain="ai.onnx.ml", string_vocabulary=["a", "b", "c"])
    return model([of], [mapping("x", STR, F)], [tensor("y", F, [1, 3])])


def test_maps_go_in_as_dicts(make: Make) -> None:
    session = make(vectorizer())
    equal(session.run(None, {"x": {"a": 1.0, "c": 2.0}})[0], np.array([[1, 0, 2]], np.float32))
    equal(session.run(None, {"x": {"a": np.float32(1), "z": 2}})[0], np.array([[1, 0, 0]], np.float32))
    by_number = node("DictVectorizer", ["x"], ["y"], domain="ai.onnx.ml", int64_vocabulary=[1, 5])
    session = make(model([by_number], [mapping("x", I64, F)], [tensor("y", F, [1, 2])]))
    equal(session.run(None, {"x": {5: 1.5, 7: 2.5}})[0], np.array([[0, 1.5]], np.float32))
    cast = node("CastMap", ["x"], ["y"], domain="ai.onnx.ml", cast_to="TO_FLOAT")
    session = make(model([cast], [mapping("x", I64, F)], [tensor("y", F, [1, None])]))
    equal(session.run(None, {"x": {5: 1.5, 2: 2.5}})[0], np.array([[2.5, 1.5]], np.float32))


@pytest.mark.parametrize(
    ("value", "error", "phrase"),
    [
        ({}, RuntimeError, "Size of dictionary is empty, unable to run the prediction."),
        (
            [{"a": 1.0}],
            RuntimeError,
            "The graph is missing type information needed to construct the ORT tensor",
        ),
        (
            ones(2),
            InvalidArgument,
            IA + "input with name: 'x' expected to be of type: 1 but received a tensor",
        ),
        ({1: 1.0}, InvalidArgument, "((map(int64,tensor(float)))) , expected: ((map(string,tensor(float))))"),
        ({"a": "b"}, RuntimeError, "Unexpected value type  <class 'str'>, it cannot be linked to C type"),
    ],
    ids=["empty", "list", "array", "int keys", "str values"],
)
def test_maps_that_are_refused(make: Make, value: Any, error: type, phrase: str) -> None:
    make.refuses(make(vectorizer()), lambda s: s.run(None, {"x": value}), error, phrase)


# --- sparse ------------------------------------------------------------------------------------------------


def coo(indices: list, values: Any, shape: list[int]) -> onnxruntime.SparseTensor:
    return onnxruntime.SparseTensor.sparse_coo_from_numpy(
        np.array(shape, np.int64), np.array(values), np.array(indices, np.int64),
        onnxruntime.OrtDevice.make("cpu", 0),
    )  # fmt: skip


def product() -> bytes:
    x = helper.make_value_info("x", helper.make_sparse_tensor_type_proto(F, [3, 3]))
    of = node("SparseToDenseMatMul", ["x", "b"], ["y"], domain="com.microsoft")
    return model([of], [x, tensor("b", F, [3, 2])], [tensor("y", F, [3, 2])])


def test_a_sparse_output(make: Make) -> None:
    values = numpy_helper.from_array(np.array([1, 2], np.float32), "v")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([1, 5]), "i"), [3, 3])
    y = helper.make_value_info("y", helper.make_sparse_tensor_type_proto(F, [3, 3]))
    session = make(model([node("Constant", [], ["y"], sparse_value=sparse)], [], [y]))
    (result,) = session.run(None, {})
    assert type(result) is C.SparseTensor
    assert result.format == onnxruntime.capi.onnxruntime_pybind11_state.OrtSparseFormat.ORT_SPARSE_COO
    assert result.values().tolist() == [1, 2]
    assert list(result.dense_shape()) == [3, 3]
    assert result.get_coo_data().indices().tolist() == [1, 5]
    (value,) = session.run_with_ort_values(None, {})
    assert value.is_sparse_tensor() and not value.is_tensor()
    assert value.data_type() == "sparse_tensor(float)"
    assert value.as_sparse_tensor().values().tolist() == [1, 2]


def test_a_sparse_input(make: Make) -> None:
    session, b = make(product()), np.arange(6, dtype=np.float32).reshape(3, 2)
    dense = np.zeros((3, 3), np.float32)
    dense[0, 1], dense[1, 2] = 1, 2
    value = onnxruntime.OrtValue.ort_value_from_sparse_tensor(
        coo([[0, 1], [1, 2]], np.array([1, 2], np.float32), [3, 3])
    )
    assert np.array_equal(session.run(None, {"x": value, "b": b})[0], dense @ b)
    assert np.array_equal(
        session.run_with_ort_values(None, {"x": value, "b": ortvalue(b)})[0].numpy(), dense @ b
    )
    phrase = (
        "Unable to handle object of type <class 'onnxruntime.capi.onnxruntime_inference_collection.Sparse"
    )
    direct = coo([[0, 1]], np.array([1], np.float32), [3, 3])
    make.refuses(session, lambda s: s.run(None, {"x": direct, "b": b}), RuntimeError, phrase)
    phrase = IA + "input with name: 'x' expected to be of type: 4 but received a tensor"
    make.refuses(session, lambda s: s.run(None, {"x": dense, "b": b}), InvalidArgument, phrase)
    linear = onnxruntime.OrtValue.ort_value_from_sparse_tensor(
        coo([1, 5], np.array([1, 2], np.float32), [3, 3])
    )
    make.refuses(
        session, lambda s: s.run(None, {"x": linear, "b": b}), Fail, "Expecting COO 2-D indices shape"
    )


def test_a_refusal_leaves_the_session_as_it_was(make: Make) -> None:
    session = make(identity(), providers=CPU)
    for value in (1.0, None, np.ones(2), "a"):
        assert raised(session.run, None, {"x": value})
        assert session.run(None, {"x": ones(2)})[0].tolist() == [1, 1]
