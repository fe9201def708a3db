"""run_async and RunOptions: what arrives where, and how a run is ended early."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.contract.both import (
    FAIL,
    I64,
    IA,
    F,
    Fail,
    InvalidArgument,
    Make,
    equal,
    fixed,
    loop,
    model,
    node,
    ones,
    ortvalue,
    raised,
    scaled,
    tensor,
)
from tests.support.waiting import DEADLINE, allowed

A, B = ones(2, 3), ones(1, 3)
FEED = {"a": A, "b": B}
TERMINATED = "Exiting due to terminate flag being set to true."


class Answer:
    """A callback that remembers how it was called."""

    def __init__(self) -> None:
        self.done, self.calls, self.thread = threading.Event(), [], ""

    def __call__(self, *arguments: Any) -> None:
        self.calls.append(arguments)
        self.thread = threading.current_thread().name
        self.done.set()

    def wait(self) -> tuple:
        assert self.done.wait(allowed(DEADLINE)), "the callback was never called"
        (call,) = self.calls
        return call


def ask(session: Any, outputs: Any, feed: Any, user_data: Any = None, *options: Any) -> tuple:
    answer = Answer()
    assert session.run_async(outputs, feed, answer, user_data, *options) is None
    return answer.wait()


# --- run_async ---------------------------------------------------------------------------------------------


def test_what_the_callback_gets(make: Make) -> None:
    session, mine, answer = make(fixed()), object(), Answer()
    session.run_async(["product", "sum"], FEED, answer, mine)
    results, user_data, error = answer.wait()
    equal(results, [(A + B) * 2, A + B])
    assert user_data is mine
    assert (type(error), error) == (str, "")
    assert answer.thread not in ("", threading.main_thread().name)


@pytest.mark.parametrize("outputs", [None, [], ""], ids=repr)
def test_no_names_are_all_outputs(make: Make, outputs: Any) -> None:
    equal(ask(make(fixed()), outputs, FEED)[0], [A + B, (A + B) * 2])


def test_ortvalues_and_options(make: Make) -> None:
    session = make(fixed())
    feed = {"a": ortvalue(A), "b": B}
    equal(ask(session, ["sum"], feed, None, onnxruntime.RunOptions())[0], [A + B])
    options = onnxruntime.RunOptions()
    options.terminate = True
    assert ask(session, ["sum"], feed, 5, options) == ([], 5, TERMINATED)


DELIVERED: dict[str, tuple[Any, Any, str]] = {
    "output": (["Q"], FEED, "Invalid output name: Q"),
    "input": (None, {**FEED, "Z": A}, "Invalid input name: Z"),
    "dtype": (
        None,
        {**FEED, "a": np.ones((2, 3))},
        "Unexpected input data type. Actual: (tensor(double)) , expected: (tensor(float))",
    ),
    "rank": (
        None,
        {**FEED, "a": A[0]},
        "Invalid rank for input: a Got: 1 Expected: 2 Please fix either the inputs/outputs or the model.",
    ),
}


@pytest.mark.parametrize("what", DELIVERED)
def test_errors_that_the_callback_gets(make: Make, what: str) -> None:
    outputs, feed, message = DELIVERED[what]
    mine = ["mine"]
    results, user_data, error = ask(make(fixed()), outputs, feed, mine)
    assert (results, error) == ([], message)
    assert user_data is mine


def test_errors_of_the_run_go_to_the_callback(make: Make) -> None:
    results, _, error = ask(make(fixed()), None, {"a": A, "b": ones(3, 3)})
    assert results == []
    assert error.startswith("Non-zero status code returned while running Add node.")
    assert "Attempting to broadcast an axis by a dimension other than 1. 2 by 3" in error


RAISED: dict[str, tuple[Any, Any, type, str]] = {
    "missing": (None, {"a": A}, ValueError, "Required inputs (['b']) are missing from input feed (['a'])."),
    "no feed": (None, None, AttributeError, "'NoneType' object has no attribute 'keys'"),
    "value": (None, {"a": 1.0, "b": B}, RuntimeError, "Unable to handle object of type <class 'float'>"),
    "tuple": (None, {"a": (1.0,), "b": B}, RuntimeError, "Input must be a list of dictionaries or a single"),
    "names": ("sum", FEED, TypeError, "run_async(): incompatible function arguments."),
    "key": (None, {**FEED, 3: A}, TypeError, "run_async(): incompatible function arguments."),
}


@pytest.mark.parametrize("what", RAISED)
def test_errors_that_the_caller_gets(make: Make, what: str) -> None:
    outputs, feed, error, phrase = RAISED[what]
    answer = Answer()
    found = raised(make(fixed()).run_async, outputs, feed, answer, None)
    assert type(found) is error
    assert phrase in str(found)
    assert not answer.calls


def test_callbacks_that_are_none(make: Make) -> None:
    error = raised(make(fixed()).run_async, None, FEED, "text", None)
    assert type(error) is TypeError
    assert str(error).startswith("run_async(): incompatible function arguments.")


def test_one_thread_is_too_few(make: Make) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    answer = Answer()
    error = raised(make(fixed(), options).run_async, None, FEED, answer, None)
    assert type(error) is InvalidArgument
    assert str(error) == IA + "intra op thread pool must have at least one thread for RunAsync"
    options.intra_op_num_threads = 2
    equal(ask(make(fixed(), options), ["sum"], FEED)[0], [A + B])
    assert not answer.calls


def test_an_exception_in_the_callback_is_printed(make: Make) -> None:
    seen, printed = threading.Event(), []

    def fails(*_: Any) -> None:
        raise ValueError("from the callback")

    def hook(what: Any) -> None:
        printed.append(what)
        seen.set()

    before, sys.unraisablehook = sys.unraisablehook, hook
    try:
        session = make(fixed())
        session.run_async(None, FEED, fails, None)
        assert seen.wait(allowed(DEADLINE)), "nothing was printed"
    finally:
        sys.unraisablehook = before
    assert (printed[0].exc_type, str(printed[0].exc_value)) == (ValueError, "from the callback")
    assert printed[0].object == "onnxruntime.InferenceSession.run_async callback"
    equal(ask(session, ["sum"], FEED)[0], [A + B])


def test_inputs_are_kept_until_the_callback_has_ended(make: Make) -> None:
    """The caller need not keep them, and the run may read them where they lie."""
    session, entered, go_on = make(scaled()), threading.Event(), threading.Event()
    x = ones(300, 300)
    kept, gone = weakref.ref(x), threading.Event()
    weakref.finalize(x, gone.set)

    def callback(*_: Any) -> None:
        entered.set()
        assert go_on.wait(allowed(DEADLINE))

    session.run_async(["more"], {"x": x}, callback, None)
    del x
    assert entered.wait(allowed(DEADLINE))
    gc.collect()
    assert kept() is not None
    go_on.set()
    assert gone.wait(allowed(DEADLINE))


def test_many_at_once(make: Make) -> None:
    session, answers = make(scaled()), [Answer() for _ in range(20)]
    for i, answer in enumerate(answers):
        session.run_async(["twice"], {"x": ones(30, 30) * i}, answer, i)
    for i, answer in enumerate(answers):
        (result,), number, error = answer.wait()
        assert (number, error) == (i, "")
        assert result.sum() == 1800 * i


def test_a_run_from_the_callback(make: Make) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session, found, done = make(fixed(), options), [], threading.Event()

    def again(results: list, user_data: Any, error: str) -> None:
        found.append(session.run(["sum"], {"a": results[0], "b": B}))
        done.set()

    session.run_async(["sum"], FEED, again, None)
    assert done.wait(allowed(DEADLINE))
    equal(found[0], [A + B * 2])


# --- ending a run ------------------------------------------------------------------------------------------


def test_a_run_that_is_to_end_before_it_begins(make: Make) -> None:
    session, options = make(fixed()), onnxruntime.RunOptions()
    options.terminate = True
    make.refuses(session, lambda s: s.run(None, FEED, options), Fail, FAIL + TERMINATED)
    options.terminate = False
    equal(session.run(["sum"], FEED, options), [A + B])


class Running:
    """A call in another thread that would take longer than anybody has."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.error: BaseException | None = None
        self._began = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(call,), daemon=True)
        self._thread.start()
        assert self._began.wait(allowed(DEADLINE))

    def _work(self, call: Callable[[], Any]) -> None:
        self._began.set()
        try:
            call()
        except Exception as error:
            self.error = error

    def join(self) -> BaseException | None:
        self._thread.join(allowed(DEADLINE))
        assert not self._thread.is_alive(), "the run did not end"
        return self.error


ENDLESS = {"n": np.array(2**62), "x": ones(4)}


@pytest.mark.parametrize("how", ["run", "run_with_ort_values", "run_with_iobinding"])
def test_a_run_is_ended_from_another_thread(make: Make, how: str) -> None:
    """Whether the flag is set just before the run begins or in its midst, the run ends."""
    session, options = make(loop()), onnxruntime.RunOptions()
    session.run(None, {"n": np.array(3), "x": ones(4)})
    if how == "run":
        running = Running(lambda: session.run(None, ENDLESS, options))
    elif how == "run_with_ort_values":
        values = {name: ortvalue(value) for name, value in ENDLESS.items()}
        values["n"] = onnxruntime.OrtValue.ortvalue_from_numpy(ENDLESS["n"])
        running = Running(lambda: session.run_with_ort_values(None, values, options))
    else:
        binding = session.io_binding()
        for name, value in ENDLESS.items():
            binding.bind_cpu_input(name, value)
        binding.bind_output("y")
        running = Running(lambda: session.run_with_iobinding(binding, options))
    options.terminate = True
    error = running.join()
    assert type(error) is (RuntimeError if how == "run_with_iobinding" else Fail)
    assert TERMINATED in str(error)
    assert session.run(None, {"n": np.array(3), "x": ones(4)})[0].shape == (4,)


def test_a_run_in_its_midst_is_ended(make: Make) -> None:
    """A second run tells that the first one is under way; only the first is ended."""
    session, options = make(loop()), onnxruntime.RunOptions()
    running = Running(lambda: session.run(None, ENDLESS, options))
    for _ in range(20):
        session.run(None, {"n": np.array(200), "x": ones(4)})
        assert running.error is None
    options.terminate = True
    error = running.join()
    assert type(error) is Fail
    assert TERMINATED in str(error)


def test_an_asynchronous_run_is_ended(make: Make) -> None:
    session, options, answer = make(loop()), onnxruntime.RunOptions(), Answer()
    session.run_async(None, ENDLESS, answer, "mine", options)
    assert not answer.calls
    options.terminate = True
    results, user_data, error = answer.wait()
    assert (results, user_data) == ([], "mine")
    assert TERMINATED in error


def test_ending_ends_all_runs_with_these_options(make: Make) -> None:
    session, options = make(loop()), onnxruntime.RunOptions()
    runs = [Running(lambda: session.run(None, ENDLESS, options)) for _ in range(2)]
    options.terminate = True
    for running in runs:
        assert TERMINATED in str(running.join())


# --- the other run options ---------------------------------------------------------------------------------


def test_only_the_path_to_what_is_fetched(make: Make) -> None:
    """Every node runs, so the one that nobody asked for fails; onnxruntime 1.31 ignores the option."""
    nodes = [node("Neg", ["x"], ["y"]), node("Gather", ["x", "i"], ["unwanted"])]
    ends = [tensor("y", F, [2]), tensor("unwanted", F, [1])]
    session = make(model(nodes, [tensor("x", F, [2]), tensor("i", I64, [1])], ends))
    feed = {"x": ones(2), "i": np.array([9])}
    make.refuses(session, lambda s: s.run(["y"], feed), InvalidArgument, "indices element out of data bounds")
    options = onnxruntime.RunOptions()
    options.only_execute_path_to_fetches = True
    assert outcome(session, feed, options) == outcome(make.twin(session), feed, options)
    good = {"x": ones(2), "i": np.array([1])}
    equal(session.run(["y"], good, options), [-ones(2)])
    equal(session.run(None, good, options), [-ones(2), ones(1)])


def outcome(session: Any, feed: dict, options: Any) -> str:
    try:
        session.run(["y"], feed, options)
    except Exception as error:
        return type(error).__name__
    return "ran"


def test_entries_of_run_options(make: Make) -> None:
    session, options = make(fixed()), onnxruntime.RunOptions()
    options.add_run_config_entry("nobody.knows", "this")
    options.logid, options.log_severity_level, options.log_verbosity_level = "me", 3, 1
    equal(session.run(["sum"], FEED, options), [A + B])
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    equal(session.run(["sum"], FEED, options), [A + B])
    assert options.get_run_config_entry("nobody.knows") == "this"
    assert (options.logid, options.terminate, options.only_execute_path_to_fetches) == ("me", False, False)


@pytest.mark.parametrize(
    ("key", "value", "phrase"),
    [
        (
            "memory.enable_memory_arena_shrinkage",
            "nonsense",
            IA + "Unsupported device specified in the memory arena shrink list: nonsense",
        ),
        ("gpu_graph_id", "xx", IA + "Failed to parse the cuda graph annotation id: xx"),
    ],
)
def test_entries_that_are_refused(make: Make, key: str, value: str, phrase: str) -> None:
    options = onnxruntime.RunOptions()
    options.add_run_config_entry(key, value)
    make.refuses(make(fixed()), lambda s: s.run(["sum"], FEED, options), InvalidArgument, phrase)
