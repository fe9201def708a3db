"""IOBinding: whose memory is read and written, when, and in which order.

Never ask a real binding for ``copy_outputs_to_cpu()`` before a run, or for text: that ends the process.
"""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from tests.contract.both import (
    STR,
    C,
    F,
    Make,
    equal,
    fixed,
    identity,
    model,
    node,
    ones,
    ortvalue,
    raised,
    scaled,
    sequence,
    tensor,
)

NO_TEXT = "Only binding non-string Tensors is currently supported"
EXECUTION = "Error in execution: "
SHAPE = (
    "The output OrtValue provided for output 'more' of node '' (Add) has shape {} "
    "but the computed output shape for this run is {}."
)


def bound(session: Any, *outputs: str, x: Any = None) -> Any:
    binding = session.io_binding()
    binding.bind_cpu_input("x", ones(2, 3) if x is None else x)
    for name in outputs:
        binding.bind_output(name)
    return binding


def allocated(*shape: int, dtype: Any = np.float32) -> onnxruntime.OrtValue:
    return onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype)


def firsts(binding: Any) -> list[float]:
    return [float(array.flat[0]) for array in binding.copy_outputs_to_cpu()]


# --- inputs ------------------------------------------------------------------------------------------------


def test_the_array_is_read_again_at_each_run(make: Make) -> None:
    session, x = make(scaled()), ones(2, 3)
    binding = bound(session, "twice", "more", x=x)
    assert session.run_with_iobinding(binding) is None
    equal(binding.copy_outputs_to_cpu(), [x * 2, x + 1])
    for value in (5, 7):
        x[:] = value
        session.run_with_iobinding(binding)
        equal(binding.copy_outputs_to_cpu(), [x * 2, x + 1])


def test_memory_at_an_address_is_read_again_at_each_run(make: Make) -> None:
    session, x = make(scaled()), ones(2, 3)
    for kind in (np.float32, TensorProto.FLOAT):
        binding = session.io_binding()
        binding.bind_input("x", "cpu", 0, kind, [2, 3], x.ctypes.data)
        binding.bind_output("more")
        for value in (3, 4):
            x[:] = value
            session.run_with_iobinding(binding)
            equal(binding.copy_outputs_to_cpu(), [x + 1])


def test_an_ortvalue_is_read_again_at_each_run(make: Make) -> None:
    session, value = make(scaled()), ortvalue(ones(2, 3))
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", value)
    binding.bind_output("more")
    for number in (1, 8):
        value.update_inplace(ones(2, 3) * number)
        session.run_with_iobinding(binding)
        assert firsts(binding) == [number + 1]


def test_an_array_that_is_not_contiguous_is_copied_when_bound(make: Make) -> None:
    session, x = make(scaled()), np.arange(12, dtype=np.float32).reshape(3, 4).T
    binding, before = bound(session, "more", x=x), x + 1
    session.run_with_iobinding(binding)
    equal(binding.copy_outputs_to_cpu(), [np.ascontiguousarray(before)])


def test_arrays_that_are_empty_or_read_only(make: Make) -> None:
    session, frozen = make(scaled()), ones(1, 1)
    frozen.flags.writeable = False
    for x in (np.zeros((0, 3), np.float32), frozen):
        binding = bound(session, "more", x=x)
        session.run_with_iobinding(binding)
        equal(binding.copy_outputs_to_cpu(), [x + 1])


def test_an_input_bound_again(make: Make) -> None:
    session = make(scaled())
    binding = bound(session, "more")
    session.run_with_iobinding(binding)
    binding.bind_cpu_input("x", ones(2, 3) * 4)
    session.run_with_iobinding(binding)
    assert firsts(binding) == [5]
    binding.bind_ortvalue_input("x", ortvalue(ones(2, 3) * 6))
    session.run_with_iobinding(binding)
    assert firsts(binding) == [7]


# --- outputs -----------------------------------------------------------------------------------------------


def test_outputs_come_in_the_order_of_binding(make: Make) -> None:
    session = make(scaled())
    binding = bound(session, "more", "twice", x=ones(2, 3) * 5)
    session.run_with_iobinding(binding)
    assert firsts(binding) == [6, 10]
    binding.bind_output("more")  # keeps its place
    session.run_with_iobinding(binding)
    assert firsts(binding) == [6, 10]
    assert [float(value.numpy()[0, 0]) for value in binding.get_outputs()] == [6, 10]


def test_what_the_outputs_are(make: Make) -> None:
    session = make(scaled())
    binding = bound(session, "twice", "more")
    session.run_with_iobinding(binding)
    outputs = binding.get_outputs()
    assert type(outputs) is list
    for output in outputs:
        assert type(output) is onnxruntime.OrtValue
        assert (output.shape(), output.data_type(), output.device_name()) == ([2, 3], "tensor(float)", "cpu")
        assert output._session is None
    raw = binding.get_outputs_as_ortvaluevector()
    assert type(raw) is C.OrtValueVector
    assert [value.data_ptr() for value in raw] == [output.data_ptr() for output in outputs]
    first, second = binding.copy_outputs_to_cpu(), binding.copy_outputs_to_cpu()
    assert type(first) is list
    assert first[0].flags.writeable and first[0].flags.c_contiguous
    assert not np.shares_memory(first[0], second[0])
    assert not np.shares_memory(first[0], outputs[0].numpy())


def test_before_a_run_outputs_are_there_but_empty(make: Make) -> None:
    binding = bound(make(scaled()), "twice", "more")
    assert [type(value) for value in binding.get_outputs()] == [onnxruntime.OrtValue] * 2
    assert len(binding.get_outputs_as_ortvaluevector()) == 2
    assert make(scaled()).io_binding().get_outputs() == []


def test_an_allocated_output_is_kept_for_the_next_run(make: Make) -> None:
    session, x = make(scaled()), ones(2, 3)
    binding = bound(session, "more", x=x)
    session.run_with_iobinding(binding)
    (output,) = binding.get_outputs()
    seen, copy = output.numpy(), binding.copy_outputs_to_cpu()[0]
    x[:] = 6
    session.run_with_iobinding(binding)
    assert binding.get_outputs()[0].data_ptr() == output.data_ptr()
    assert seen[0, 0] == 7 and copy[0, 0] == 2


def test_an_allocated_output_of_another_shape_is_refused(make: Make) -> None:
    session = make(scaled())
    binding = bound(session, "more")
    session.run_with_iobinding(binding)
    for rows in (4, 1):
        binding.bind_cpu_input("x", ones(rows, 3))
        error = raised(session.run_with_iobinding, binding)
        assert type(error) is RuntimeError
        assert str(error).startswith(EXECUTION + "Non-zero status code returned while running Add node.")
        assert SHAPE.format("{2,3}", f"{{{rows},3}}") in str(error)
        assert binding.copy_outputs_to_cpu()[0].shape == (2, 3)
    binding.bind_output("more")  # gives the memory up
    session.run_with_iobinding(binding)
    equal(binding.copy_outputs_to_cpu(), [ones(1, 3) * 2])


def test_memory_at_an_address_is_written_to(make: Make) -> None:
    session, x, y = make(scaled()), ones(2, 3), np.zeros((2, 3), np.float32)
    for kind in (np.float32, TensorProto.FLOAT):
        binding = bound(session, x=x)
        binding.bind_output("more", "cpu", 0, kind, [2, 3], y.ctypes.data)
        for value in (3, 4):
            x[:] = value
            session.run_with_iobinding(binding)
            equal(y, x + 1)
        (output,) = binding.get_outputs()
        assert output.data_ptr() == y.ctypes.data
        equal(binding.copy_outputs_to_cpu(), [y])


def test_an_ortvalue_is_written_to(make: Make) -> None:
    session, value, x = make(scaled()), allocated(2, 3), ones(2, 3)
    binding = bound(session, "twice", x=x)
    binding.bind_ortvalue_output("more", value)
    for number in (1, 8):
        x[:] = number
        session.run_with_iobinding(binding)
        assert value.numpy()[0, 0] == number + 1
        assert binding.get_outputs()[1].data_ptr() == value.data_ptr()
    mine = session.create_ortvalue_from_shape_and_type([2, 3], np.float32, "cpu")
    binding.bind_ortvalue_output("more", mine)
    session.run_with_iobinding(binding)
    assert mine.numpy()[0, 0] == 9


def test_one_models_output_as_anothers_input(make: Make) -> None:
    first, second = make(scaled()), make(scaled())
    one = bound(first, "twice")
    two = second.io_binding()
    two.bind_output("more")
    for _ in range(2):
        first.run_with_iobinding(one)
        two.bind_ortvalue_input("x", one.get_outputs()[0])
        second.run_with_iobinding(two)
        assert firsts(two) == [3]


@pytest.mark.parametrize(
    ("value", "phrase"),
    [
        (allocated(5, 3), SHAPE.format("{5,3}", "{2,3}")),
        (
            allocated(2, 3, dtype=np.float64),
            "Unexpected output data type. Actual: (tensor(double))",
        ),
    ],
    ids=["shape", "dtype"],
)
def test_memory_that_does_not_fit(make: Make, value: onnxruntime.OrtValue, phrase: str) -> None:
    session = make(scaled())
    binding = bound(session)
    binding.bind_ortvalue_output("more", value)
    error = raised(session.run_with_iobinding, binding)
    assert type(error) is RuntimeError
    assert str(error).startswith(EXECUTION)
    assert phrase in str(error)
    binding.bind_output("more", "cpu", 0, value.numpy().dtype.type, value.shape(), value.data_ptr())
    assert phrase in str(raised(session.run_with_iobinding, binding))


def test_clearing(make: Make) -> None:
    session = make(scaled())
    binding = bound(session, "twice", "more")
    session.run_with_iobinding(binding)
    binding.clear_binding_outputs()
    assert binding.get_outputs() == binding.copy_outputs_to_cpu() == []
    error = raised(session.run_with_iobinding, binding)
    assert (type(error), str(error)) == (RuntimeError, EXECUTION + "At least one output should be requested.")
    binding.clear_binding_inputs()
    binding.bind_output("more")
    assert "Missing Input: x" in str(raised(session.run_with_iobinding, binding))
    binding.bind_cpu_input("x", ones(1, 1))
    session.run_with_iobinding(binding)
    assert firsts(binding) == [2]


def test_results_outlive_binding_and_session(make: Make) -> None:
    session = make(scaled())
    binding = bound(session, "more")
    session.run_with_iobinding(binding)
    (output,) = binding.get_outputs()
    raw = binding.get_outputs_as_ortvaluevector()
    del session, binding
    gc.collect()
    equal(output.numpy(), ones(2, 3) * 2)
    equal(raw[0].numpy(), ones(2, 3) * 2)


# --- errors ------------------------------------------------------------------------------------------------


def test_unknown_inputs_are_refused_at_once(make: Make) -> None:
    binding, x = make(scaled()).io_binding(), ones(2, 3)
    error = raised(binding.bind_cpu_input, "Q", x)
    listed = "Failed to find NodeArg with name: Q in the def list"
    assert (type(error), str(error)) == (RuntimeError, listed)
    error = raised(binding.bind_output, "Q", "cpu", 0, np.float32, [2, 3], x.ctypes.data)
    assert (type(error), str(error)) == (RuntimeError, listed)
    mapped = "Error when binding input: Failed to find input name in the mapping: Q"
    error = raised(binding.bind_ortvalue_input, "Q", ortvalue(x))
    assert (type(error), str(error)) == (RuntimeError, mapped)
    error = raised(binding.bind_input, "Q", "cpu", 0, np.float32, [2, 3], x.ctypes.data)
    assert (type(error), str(error)) == (RuntimeError, mapped)


def test_unknown_outputs_are_refused_at_the_run(make: Make) -> None:
    session = make(scaled())
    one, two = bound(session, "Q"), bound(session)
    two.bind_ortvalue_output("Q", allocated(2, 3))
    for binding in (one, two):
        error = raised(session.run_with_iobinding, binding)
        assert (type(error), str(error)) == (RuntimeError, EXECUTION + "Invalid output name: Q")


@pytest.mark.parametrize(
    ("value", "phrase"),
    [
        ([[1.0]], "Unable to create OrtValue from the given python object"),
        (None, "Unable to create OrtValue from the given python object"),
        (1.0, "Unable to create OrtValue from the given python object"),
    ],
    ids=repr,
)
def test_values_that_cannot_be_bound(make: Make, value: Any, phrase: str) -> None:
    error = raised(make(scaled()).io_binding().bind_cpu_input, "x", value)
    assert (type(error), str(error)) == (RuntimeError, phrase)


def test_text_and_sequences_cannot_be_bound_as_arrays(make: Make) -> None:
    binding = make(identity(STR)).io_binding()
    for value in (np.array(["a"], object), np.array(["a"])):
        error = raised(binding.bind_cpu_input, "x", value)
        assert (type(error), str(error)) == (RuntimeError, NO_TEXT)
    session = make(model([node("Identity", ["x"], ["y"])], [sequence("x")], [sequence("y")]))
    error = raised(session.io_binding().bind_cpu_input, "x", [ones(2)])
    assert (type(error), str(error)) == (RuntimeError, "Only binding Tensors is currently supported")


def test_memory_at_an_address_that_is_said_to_hold_text(make: Make) -> None:
    """Refused as an input, whatever its name; as an output by the run, or at once if that is text."""
    memory = np.zeros(64, np.uint8).ctypes.data
    numbers, text = make(scaled()), make(identity(STR))
    binding = bound(numbers)
    for kind in (np.str_, np.object_, str, np.bytes_, np.dtype("U3"), 8):
        for session, name in ((numbers, "x"), (numbers, "Q"), (text, "x")):
            error = raised(session.io_binding().bind_input, name, "cpu", 0, kind, [2], memory)
            assert (type(error), str(error)) == (RuntimeError, NO_TEXT)
        binding.bind_output("more", "cpu", 0, kind, [2], memory)
        (value,) = binding.get_outputs()
        assert (value.data_type(), value.shape()) == ("tensor(string)", [2])
        assert "Unexpected output data type." in str(raised(numbers.run_with_iobinding, binding))
    for kind in (np.str_, np.float32):
        error = raised(text.io_binding().bind_output, "y", "cpu", 0, kind, [2], memory)
        assert (type(error), str(error)) == (RuntimeError, NO_TEXT)
    error = raised(binding.bind_output, "Q", "cpu", 0, np.str_, [2], memory)
    assert str(error) == "Failed to find NodeArg with name: Q in the def list"
    error = raised(binding.bind_input, "x", "nope", 0, np.str_, [2], memory)
    assert (type(error), str(error)) == (Exception, "Unsupported device type: nope")


@pytest.mark.parametrize(
    ("x", "phrase"),
    [
        (np.ones((2, 3)), "Unexpected input data type. Actual: (tensor(double)) , expected: (tensor(float))"),
        (ones(2), "Invalid rank for input: x Got: 1 Expected: 2 Please fix either the inputs/outputs"),
    ],
    ids=["dtype", "rank"],
)
def test_inputs_that_do_not_fit_are_refused_at_the_run(make: Make, x: np.ndarray, phrase: str) -> None:
    session = make(scaled())
    by_address, by_value = bound(session, "more"), bound(session, "more")
    by_address.bind_input("x", "cpu", 0, x.dtype.type, list(x.shape), x.ctypes.data)
    by_value.bind_ortvalue_input("x", ortvalue(x))
    for binding in (bound(session, "more", x=x), by_address, by_value):
        error = raised(session.run_with_iobinding, binding)
        assert type(error) is RuntimeError
        assert str(error).startswith(EXECUTION + phrase)


def test_arguments_that_are_refused(make: Make) -> None:
    binding, x = make(scaled()).io_binding(), ones(2, 3)
    for bind in (binding.bind_ortvalue_input, binding.bind_ortvalue_output):
        error = raised(bind, "x", x)
        assert (type(error), str(error)) == (
            AttributeError,
            "'numpy.ndarray' object has no attribute '_session'",
        )
    error = raised(binding.bind_output, "more", "cpu", 0, None, None, x.ctypes.data)
    assert type(error) is ValueError
    assert str(error).startswith("`element_type` and `shape` are to be provided if pre-allocated memory")
    error = raised(binding.bind_output, "more", "nope")
    assert (type(error), str(error)) == (Exception, "Unsupported device type: nope")
    error = raised(binding.bind_input, "x", "cpu", 0, "zzz", [2, 3], x.ctypes.data)
    assert (type(error), str(error)) == (RuntimeError, "Not a valid numpy type")


def test_a_binding_belongs_to_its_session(make: Make) -> None:
    mine, other = make(scaled()), make(scaled())
    error = raised(other.run_with_iobinding, bound(mine, "more"))
    message = "IOBinding must be used with the session that created it."
    assert (type(error), str(error)) == (ValueError, message)
    error = raised(mine.run_with_iobinding, None)
    assert (type(error), str(error)) == (AttributeError, "'NoneType' object has no attribute '_session'")


def test_missing_inputs(make: Make) -> None:
    session = make(fixed())
    binding = session.io_binding()
    binding.bind_cpu_input("a", ones(2, 3))
    binding.bind_output("sum")
    error = raised(session.run_with_iobinding, binding)
    assert type(error) is RuntimeError
    assert str(error).startswith(EXECUTION + "Non-zero status code returned while running Add node.")
    assert "Missing Input: b" in str(error)


def test_run_options(make: Make) -> None:
    session, options = make(scaled()), onnxruntime.RunOptions()
    binding = bound(session, "more")
    session.run_with_iobinding(binding, options)
    assert firsts(binding) == [2]
    options.terminate = True
    error = raised(session.run_with_iobinding, binding, options)
    message = EXECUTION + "Exiting due to terminate flag being set to true."
    assert (type(error), str(error)) == (RuntimeError, message)
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", "xx")
    error = raised(session.run_with_iobinding, binding, options)
    message = "Run option 'gpu_graph_id' must be an integer, got 'xx'."
    assert (type(error), str(error)) == (ValueError, message)


def test_synchronizing(make: Make) -> None:
    session = make(scaled())
    binding = bound(session, "more")
    assert binding.synchronize_inputs() is None
    session.run_with_iobinding(binding)
    assert binding.synchronize_outputs() is None
    assert firsts(binding) == [2]


def test_text_and_sequences_as_ortvalues(make: Make) -> None:
    constant = helper.make_tensor("c", STR, [2], ["a", "ä"])
    nodes = [
        node("Constant", [], ["text"], value=constant),
        node("SequenceConstruct", ["x"], ["items"]),
    ]
    source = model(nodes, [tensor("x", F)], [tensor("text", STR), sequence("items")])
    text, items = make(source).run_with_ort_values(None, {"x": ortvalue(ones(2))})
    session = make(identity(STR))
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", text)
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    assert binding.get_outputs()[0].numpy().tolist() == ["a", "ä"]
    session = make(model([node("Identity", ["x"], ["y"])], [sequence("x")], [sequence("y")]))
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", items)
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    assert binding.get_outputs()[0].is_tensor_sequence()
    equal(binding.copy_outputs_to_cpu(), [[ones(2)]])


def test_two_bindings_of_one_session(make: Make) -> None:
    session = make(scaled())
    one, two = bound(session, "more"), bound(session, "twice", x=ones(4, 4) * 3)
    session.run_with_iobinding(one)
    session.run_with_iobinding(two)
    assert (firsts(one), firsts(two)) == ([2], [6])
    assert session.run(["more"], {"x": ones(1, 1)})[0].tolist() == [[2]]
