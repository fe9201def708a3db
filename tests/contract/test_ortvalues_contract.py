"""OrtValues in and out: what they say of themselves, who shares their memory, whose they are."""

from __future__ import annotations

import ctypes
import gc
import threading
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from tests.contract.both import (
    DTYPES,
    I64,
    IA,
    STR,
    C,
    F,
    Fail,
    InvalidArgument,
    Make,
    equal,
    fixed,
    identity,
    maps,
    model,
    node,
    ones,
    optional,
    ortvalue,
    raised,
    scaled,
    sequence,
    tensor,
)

pytestmark = pytest.mark.slow

A, B = ones(2, 3), ones(1, 3)
FEED = {"a": ortvalue(A), "b": ortvalue(B)}
CPU_DEVICE = onnxruntime.OrtDevice.make("cpu", 0)._get_c_device()
OTHER = "Session-scoped OrtValue must be {} the session that created it."


def texts(make: Make, *items: str) -> onnxruntime.OrtValue:
    """An OrtValue of text, which only a model can make."""
    constant = helper.make_tensor("c", STR, [len(items)], list(items))
    session = make(model([node("Constant", [], ["y"], value=constant)], [], [tensor("y", STR)]))
    return session.run_with_ort_values(None, {})[0]


def pair(make: Make) -> onnxruntime.OrtValue:
    """An OrtValue of a sequence."""
    nodes = [node("SequenceConstruct", ["a", "b"], ["y"])]
    session = make(model(nodes, [tensor("a"), tensor("b")], [sequence("y")]))
    return session.run_with_ort_values(None, {"a": ortvalue(ones(2)), "b": ortvalue(ones(1, 2))})[0]


# --- results -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype(make: Make, code: str) -> None:
    session = make(identity(DTYPES[code]))
    for shape in [(), (1,), (0, 3), (2, 3), (1,) * 20, (30_000,)]:
        data = np.asarray(np.arange(np.prod(shape)).reshape(shape) % 2).astype(code)
        value = onnxruntime.OrtValue.ortvalue_from_numpy(data)
        (result,) = session.run_with_ort_values(None, {"x": value})
        equal(result.numpy(), data)
        assert result.shape() == list(shape)
        assert result.element_type() == DTYPES[code]
        assert result.tensor_size_in_bytes() == data.nbytes


def test_what_a_result_is(make: Make) -> None:
    results = make(fixed()).run_with_ort_values(None, FEED)
    assert type(results) is list
    for result in results:
        assert type(result) is onnxruntime.OrtValue
        assert type(result._get_c_value()) is C.OrtValue
        assert result.data_type() == "tensor(float)"
        assert result.shape() == [2, 3]
        assert result.element_type() == TensorProto.FLOAT
        assert result.device_name() == "cpu"
        assert result.tensor_size_in_bytes() == 24
        assert result.data_ptr() % 64 == 0
        assert result.is_tensor() and result.has_value()
        assert not result.is_sparse_tensor() and not result.is_tensor_sequence()
        assert result._session is None


def test_a_results_memory(make: Make) -> None:
    result, other = make(scaled()).run_with_ort_values(None, {"x": ortvalue(A)})
    seen, again = result.numpy(), result.numpy()
    assert seen.flags.writeable and seen.flags.c_contiguous
    assert np.shares_memory(seen, again)
    assert seen.ctypes.data == result.data_ptr() != other.data_ptr()
    result.update_inplace(np.full((2, 3), 9, np.float32))
    assert seen.tolist() == [[9] * 3] * 2
    result.update_inplace(ortvalue(A * 4))
    assert seen.tolist() == [[4] * 3] * 2
    assert other.numpy().tolist() == [[2] * 3] * 2
    assert ctypes.string_at(result.data_ptr(), 24) == (A * 4).tobytes()
    size = "The input size of numpy arrays does not match the size of the OrtValue."
    assert str(raised(result.update_inplace, ones(4, 3))) == size
    error = raised(result.update_inplace, [1.0])
    assert (type(error), str(error)) == (TypeError, "data must be a numpy.ndarray or an OrtValue.")


def test_a_result_as_an_array_of_others(make: Make) -> None:
    (result,) = make(identity()).run_with_ort_values(None, {"x": ortvalue(A)})
    assert result.__dlpack_device__() == (1, 0)
    view = np.from_dlpack(result)
    assert view.ctypes.data == result.data_ptr()
    equal(np.asarray(result), A)
    assert np.asarray(result, np.float64).dtype == np.float64
    shared = onnxruntime.OrtValue.from_dlpack(result)
    assert shared.data_ptr() == result.data_ptr()
    kept = np.from_dlpack(shared)
    del result, shared, view
    gc.collect()
    equal(np.array(kept), A)


def test_results_outlive_the_session(make: Make) -> None:
    session = make(scaled())
    first, second = session.run_with_ort_values(None, {"x": ortvalue(ones(100, 200))})
    del session
    gc.collect()
    assert first.numpy().sum() == second.numpy().sum() == 40_000
    first.update_inplace(ones(100, 200))
    assert first.numpy().sum() == 20_000


def test_results_do_not_change_with_later_calls(make: Make) -> None:
    session = make(scaled())
    kept = [session.run_with_ort_values(["twice"], {"x": ortvalue(ones(90, 90) * i)})[0] for i in range(4)]
    assert [value.numpy()[0, 0] for value in kept] == [0, 2, 4, 6]
    assert len({value.data_ptr() for value in kept}) == 4


# --- names and feeds ---------------------------------------------------------------------------------------


def test_names_of_outputs(make: Make) -> None:
    session = make(fixed())

    def firsts(outputs: Any) -> list[float]:
        return [value.numpy()[0, 0] for value in session.run_with_ort_values(outputs, FEED)]

    assert firsts(None) == firsts([]) == firsts("") == [2, 4]
    assert firsts(["product", "sum"]) == [4, 2]
    assert firsts(("sum",)) == [2]
    first, second = session.run_with_ort_values(["sum", "sum"], FEED)
    assert first.data_ptr() == second.data_ptr()
    phrase = IA + "Invalid output name:Q"
    make.refuses(session, lambda s: s.run_with_ort_values(["Q"], FEED), InvalidArgument, phrase)
    error = raised(session.run_with_ort_values, "Q", FEED)
    assert type(error) is TypeError
    assert str(error).startswith("run_with_ort_values(): incompatible function arguments.")


REFUSED: dict[str, tuple[Any, type, str]] = {
    "missing": ({"a": FEED["a"]}, ValueError, "Required inputs (['b']) are missing from input feed (['a'])."),
    "extra": ({**FEED, "Z": FEED["a"]}, InvalidArgument, IA + "Invalid input name: Z"),
    "array": ({**FEED, "a": A}, AttributeError, "'numpy.ndarray' object has no attribute '_get_c_value'"),
    "None": ({**FEED, "a": None}, AttributeError, "'NoneType' object has no attribute '_get_c_value'"),
    "list": ({**FEED, "a": [1.0]}, AttributeError, "'list' object has no attribute '_get_c_value'"),
    "C": ({**FEED, "a": FEED["a"]._ortvalue}, AttributeError, "object has no attribute '_get_c_value'"),
    "dtype": (
        {**FEED, "a": ortvalue(np.ones((2, 3)))},
        InvalidArgument,
        "Actual: (tensor(double))",
    ),
    "rank": (
        {**FEED, "a": ortvalue(ones(3))},
        InvalidArgument,
        "Invalid rank for input: a Got: 1",
    ),
    "dimension": ({**FEED, "a": ortvalue(ones(2, 4))}, InvalidArgument, " index: 1 Got: 4 Expected: 3\n"),
    "no feed": (None, AttributeError, "'NoneType' object has no attribute 'keys'"),
    "a list": ([1], AttributeError, "'list' object has no attribute 'keys'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_feeds_that_are_refused(make: Make, what: str) -> None:
    feed, error, phrase = REFUSED[what]
    make.refuses(make(fixed()), lambda s: s.run_with_ort_values(None, feed), error, phrase)


def test_run_options(make: Make) -> None:
    session, options = make(fixed()), onnxruntime.RunOptions()
    assert len(session.run_with_ort_values(None, FEED, options)) == 2
    options.terminate = True
    phrase = "[ONNXRuntimeError] : 1 : FAIL : Exiting due to terminate flag being set to true."
    make.refuses(session, lambda s: s.run_with_ort_values(None, FEED, options), Fail, phrase)


def test_ortvalues_as_inputs_of_run(make: Make) -> None:
    session = make(fixed())
    equal(session.run(["sum"], FEED), [A + B])
    equal(session.run(["sum"], {"a": FEED["a"], "b": B * 2}), [A + B * 2])
    value = ortvalue(A.copy())
    equal(session.run(["sum"], {"a": value, "b": B}), [A + B])
    value.update_inplace(A * 5)
    equal(session.run(["sum"], {"a": value, "b": B}), [A * 5 + B])
    (result,) = session.run_with_ort_values(["sum"], FEED)
    equal(session.run(["sum"], {"a": result, "b": B}), [A + B * 2])


# --- other kinds -------------------------------------------------------------------------------------------


def test_text(make: Make) -> None:
    value = texts(make, "a", "bcdä" * 20)
    session = make(identity(STR))
    (result,) = session.run_with_ort_values(None, {"x": value})
    assert (result.data_type(), result.shape(), result.element_type()) == ("tensor(string)", [2], STR)
    assert result.numpy().tolist() == ["a", "bcdä" * 20]
    assert session.run(None, {"x": value})[0].tolist() == ["a", "bcdä" * 20]
    error = raised(result.update_inplace, np.array(["x", "y"], object))
    assert "Inplace update of OrtValues is currently only supported from non-string" in str(error)


def test_sequences(make: Make) -> None:
    value = pair(make)
    assert value.is_tensor_sequence() and value.has_value()
    assert not value.is_tensor() and not value.is_sparse_tensor()
    assert (value.data_type(), value.element_type()) == ("seq(tensor(float))", F)
    for method in (value.shape, value.device_name, value.numpy, value.tensor_size_in_bytes):
        error = raised(method)
        assert type(error) is RuntimeError
        assert "Only OrtValues that are Tensors" in str(error)
    session = make(model([node("Identity", ["x"], ["y"])], [sequence("x")], [sequence("y")]))
    equal(session.run(None, {"x": value}), [[ones(2), ones(1, 2)]])
    (again,) = session.run_with_ort_values(None, {"x": value})
    equal(session.run(None, {"x": again}), [[ones(2), ones(1, 2)]])


def test_optionals(make: Make) -> None:
    session = make(model([node("Identity", ["x"], ["y"])], [optional("x")], [optional("y")]))
    (nothing,) = session.run_with_ort_values(None, {})
    assert not nothing.has_value()
    assert nothing.is_tensor()  # anything else that is asked of it ends the process
    (something,) = session.run_with_ort_values(None, {"x": ortvalue(A)})
    assert something.has_value() and something.is_tensor()
    assert something.data_type() == "tensor(float)"
    equal(something.numpy(), A)


def test_maps(make: Make) -> None:
    zipped = node("ZipMap", ["x"], ["y"], domain="ai.onnx.ml", classlabels_int64s=[3, 5])
    session = make(model([zipped], [tensor("x", F, ["N", 2])], [maps("y", I64)]))
    (value,) = session.run_with_ort_values(None, {"x": ortvalue(ones(1, 2))})
    assert value.data_type() == "seq(map(int64,tensor(float)))"
    assert value.has_value()
    assert not value.is_tensor() and not value.is_tensor_sequence() and not value.is_sparse_tensor()
    assert type(raised(value.numpy)) is RuntimeError


# --- those that belong to a session ------------------------------------------------------------------------


def test_an_ortvalue_of_the_sessions_allocator(make: Make) -> None:
    session = make(fixed())
    value = session.create_ortvalue_from_shape_and_type([2, 3], np.float32, "cpu")
    assert type(value) is onnxruntime.OrtValue
    assert value._session is session._sess is not None
    assert (value.shape(), value.data_type(), value.device_name()) == ([2, 3], "tensor(float)", "cpu")
    value.update_inplace(A * 3)
    equal(session.run(["sum"], {"a": value, "b": B}), [A * 3 + B])
    equal(session.run_with_ort_values(["sum"], {"a": value, "b": FEED["b"]})[0].numpy(), A * 3 + B)
    narrow = session.create_ortvalue_from_shape_and_type([2], TensorProto.BFLOAT16, "cpu", 0)
    assert narrow.data_type() == "tensor(bfloat16)"
    del session
    gc.collect()
    equal(value.numpy(), A * 3)


@pytest.mark.parametrize(
    ("arguments", "error", "phrase"),
    [
        (
            ([2], np.str_, "cpu"),
            RuntimeError,
            "Creation of OrtValues is currently only supported for",
        ),
        (([2], STR, "cpu"), RuntimeError, "Creation of OrtValues is currently only supported for"),
        (([2], 99, "cpu"), RuntimeError, "tensor type 99 is not supported"),
        (([-2], np.float32, "cpu"), RuntimeError, "Tensor shape.Size() must be >= 0"),
        (([2], np.float32, "nope"), Exception, "Unsupported device type: nope"),
        (([2], np.float32, "npu"), RuntimeError, "No session allocator found for Device:[DeviceType:"),
        (([2], np.float32), TypeError, "missing 1 required positional argument: 'device_type'"),
    ],
    ids=["numpy text", "text", "type", "shape", "device", "absent device", "no device"],
)
def test_ortvalues_that_it_cannot_make(make: Make, arguments: tuple, error: type, phrase: str) -> None:
    found = raised(make(fixed()).create_ortvalue_from_shape_and_type, *arguments)
    assert type(found) is error
    assert phrase in str(found)


def test_ortvalues_of_another_session(make: Make) -> None:
    mine, other = make(fixed()), make(fixed())
    value = mine.create_ortvalue_from_shape_and_type([2, 3], np.float32, "cpu")
    mixed = {"a": value, "b": FEED["b"]}
    for act in (
        lambda: other.run(["sum"], mixed),
        lambda: other.run_with_ort_values(["sum"], mixed),
        lambda: other.run_async(["sum"], mixed, lambda *_: None, None),
    ):
        error = raised(act)
        assert (type(error), str(error)) == (ValueError, OTHER.format("used with"))
    binding = other.io_binding()
    for bind in (binding.bind_ortvalue_input, binding.bind_ortvalue_output):
        error = raised(bind, "a", value)
        assert (type(error), str(error)) == (ValueError, OTHER.format("bound to"))
    value.update_inplace(ortvalue(A))
    foreign = other.create_ortvalue_from_shape_and_type([2, 3], np.float32, "cpu")
    error = raised(value.update_inplace, foreign)
    assert str(error) == "Session-scoped OrtValues must originate from the same session."


# --- vectors -----------------------------------------------------------------------------------------------


def vector(*values: onnxruntime.OrtValue) -> Any:
    made = C.OrtValueVector()
    for value in values:
        made.push_back(value._ortvalue)
    return made


def test_a_vector_of_the_callers_is_filled(make: Make) -> None:
    session, options = make(fixed()), onnxruntime.RunOptions()
    feeds, fetches = vector(FEED["a"], FEED["b"]), C.OrtValueVector()
    names, devices = ["product", "sum"], [CPU_DEVICE] * 2
    assert session.run_with_ortvaluevector(options, ["a", "b"], feeds, names, fetches, devices) is None
    assert [onnxruntime.OrtValue(v).numpy()[0, 0] for v in fetches] == [4, 2]
    session.run_with_ortvaluevector(
        options, ["b", "a"], vector(FEED["b"], FEED["a"]), names, fetches, devices
    )
    assert [onnxruntime.OrtValue(v).numpy()[0, 0] for v in fetches] == [4, 2]
    del session
    gc.collect()
    assert fetches[0].numpy()[1, 2] == 4


def test_values_in_the_callers_vector_are_written_to(make: Make) -> None:
    mine = onnxruntime.OrtValue.ortvalue_from_shape_and_type([2, 3], np.float32)
    fetches, feeds = vector(mine), vector(FEED["a"], FEED["b"])
    make(fixed()).run_with_ortvaluevector(
        onnxruntime.RunOptions(), ["a", "b"], feeds, ["sum"], fetches, [CPU_DEVICE]
    )
    assert fetches[0].data_ptr() == mine.data_ptr()
    equal(mine.numpy(), A + B)


@pytest.mark.parametrize(
    ("feeds", "fetches", "phrase"),
    [
        (["a", "Q"], ["sum"], "Invalid input name: Q"),
        (["a", "b"], ["Q"], "Invalid output name:Q"),
        (["a"], ["sum"], "feed names has 1 elements, but feed has 2 elements."),
    ],
    ids=["input", "output", "too few"],
)
def test_vectors_that_are_refused(make: Make, feeds: list, fetches: list, phrase: str) -> None:
    def act(session: Any) -> None:
        given = vector(FEED["a"], FEED["b"])
        session.run_with_ortvaluevector(
            onnxruntime.RunOptions(), feeds, given, fetches, C.OrtValueVector(), [CPU_DEVICE]
        )

    make.refuses(make(fixed()), act, InvalidArgument, IA + phrase)


def test_vectors_need_run_options_and_be_vectors(make: Make) -> None:
    session, out = make(fixed()), C.OrtValueVector()
    given = vector(FEED["a"], FEED["b"])
    for options, feeds in ((None, given), (onnxruntime.RunOptions(), [FEED["a"], FEED["b"]])):
        error = raised(
            session.run_with_ortvaluevector, options, ["a", "b"], feeds, ["sum"], out, [CPU_DEVICE]
        )
        assert type(error) is TypeError
        assert str(error).startswith("run_with_ortvaluevector(): incompatible function arguments.")


def test_calls_from_many_threads(make: Make) -> None:
    session, wrong = make(scaled()), []

    def work(number: int) -> None:
        for _ in range(5):
            (result,) = session.run_with_ort_values(["twice"], {"x": ortvalue(ones(50, 50) * number)})
            if result.numpy().sum() != 5000 * number:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
