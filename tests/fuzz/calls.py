"""The steps of the fuzzer of results: how inputs look, how a model is called, what happens around it."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import onnxruntime

import onnx_dl
from onnx_dl import InferenceSessionProxy
from onnx_dl.errors import SupervisorDied, WorkerDied
from tests.fuzz import faults
from tests.fuzz.steps import Step, Wrong
from tests.support import zoo

if TYPE_CHECKING:
    from tests.fuzz.results import World

LATE: Final = 60.0
"""Seconds that no call here takes."""
OURS: Final = (onnx_dl.OnnxDLError,)


class Call(NamedTuple):
    """One inference, and what it has to give."""

    kind: str
    outputs: list[str] | None
    feed: zoo.Feed
    wanted: Any


def numbers(rng: random.Random) -> np.random.Generator:
    return np.random.default_rng(rng.getrandbits(64))


def draw(rng: random.Random, world: World, kind: str | None = None, feed: zoo.Feed | None = None) -> Call:
    """A model, some of its outputs, and inputs in some form."""
    name = kind or rng.choice(list(zoo.kinds()))
    what = zoo.kinds()[name]
    size = min(what.most, rng.choice(zoo.SIZES))
    given = what.draw(numbers(rng), size) if feed is None else feed
    outputs = some_outputs(rng, name)
    wanted = zoo.expected(name, outputs, given)
    return Call(name, outputs, {key: dressed(rng, world, value) for key, value in given.items()}, wanted)


def some_outputs(rng: random.Random, kind: str) -> list[str] | None:
    names = zoo.outputs_of(kind)
    return None if rng.random() < 0.5 else rng.sample(names, rng.randint(1, len(names)))


def dressed(rng: random.Random, world: World, value: Any) -> Any:
    """The same values in another form: views of all kinds, memory that workers see."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
        return value
    return rng.choice(FORMS)(world, value)


def _shared(world: World, value: np.ndarray) -> np.ndarray:
    array = world.hosts["socket"].empty(value.shape, value.dtype)
    array[...] = value
    return array


def _part_of_shared(world: World, value: np.ndarray) -> np.ndarray:
    array = world.hosts["zmq"].empty((3, *value.shape), value.dtype)
    array[1] = value
    return array[1, ...]  # an array, also where it has no dimensions


def _every_second(world: World, value: np.ndarray) -> np.ndarray:
    array = np.zeros((*value.shape, 2), value.dtype)
    array[..., 1] = value
    return array[..., 1]


def _backwards(world: World, value: np.ndarray) -> np.ndarray:
    return np.flip(np.flip(value).copy()) if value.ndim else value


def _by_columns(world: World, value: np.ndarray) -> np.ndarray:
    return np.array(value, order="F")


def _unaligned(world: World, value: np.ndarray) -> np.ndarray:
    memory = np.zeros(value.nbytes + 1, np.uint8)[1:]
    array = memory.view(value.dtype).reshape(value.shape)
    array[...] = value
    return array


def _read_only(world: World, value: np.ndarray) -> np.ndarray:
    array = value.copy()
    array.setflags(write=False)
    return array


FORMS: Final[Sequence[Callable[[World, np.ndarray], np.ndarray]]] = (
    lambda world, value: value, lambda world, value: value,
    _shared, _part_of_shared, _every_second, _backwards, _by_columns, _unaligned, _read_only,
)  # fmt: skip


# --- ways to call ----------------------------------------------------------------------------------------


def plainly(proxy: InferenceSessionProxy, call: Call) -> Any:
    return proxy.run(call.outputs, call.feed)


def with_options(proxy: InferenceSessionProxy, call: Call) -> Any:
    options = onnxruntime.RunOptions()
    options.log_severity_level = 4
    return proxy.run(call.outputs, call.feed, options)


def in_time(proxy: InferenceSessionProxy, call: Call) -> Any:
    return proxy.run(call.outputs, call.feed, timeout=LATE)


def awaited(proxy: InferenceSessionProxy, call: Call) -> Any:
    return asyncio.run(proxy.arun(call.outputs, call.feed))


def called_back(proxy: InferenceSessionProxy, call: Call) -> Any:
    told: list[Any] = []
    done = threading.Event()

    def callback(results: Any, _: object, error: str) -> None:
        told[:] = results, error
        done.set()

    proxy.run_async(call.outputs, call.feed, callback, None)
    if not done.wait(LATE):
        raise Wrong("run_async() never called back.")
    results, error = told
    if not error:
        return list(results)
    raise _same_words(call, error)


def _same_words(call: Call, text: str) -> Exception:
    """The error that ``run()`` raises, where another way tells the same in another class."""
    if isinstance(call.wanted, Exception) and str(call.wanted).endswith(
        text.removeprefix("Error in execution: ")
    ):
        return call.wanted
    deaths = {"The onnx-dl supervisor process": SupervisorDied, "The worker of": WorkerDied}
    for words, death in deaths.items():
        if text.startswith(words):
            return death(text)
    return Wrong(f"{call.kind}, {shapes(call.feed)}: {text}")


def with_values(proxy: InferenceSessionProxy, call: Call) -> Any:
    feed = {name: _value(array) for name, array in call.feed.items()}
    return [value.numpy() for value in proxy.run_with_ort_values(call.outputs, feed)]


def _value(array: np.ndarray) -> onnxruntime.OrtValue:
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array).reshape(array.shape))


def bound(proxy: InferenceSessionProxy, call: Call) -> Any:
    binding = proxy.io_binding()
    for name, array in call.feed.items():
        binding.bind_cpu_input(name, array)
    for name in call.outputs or zoo.outputs_of(call.kind):
        binding.bind_output(name)
    try:
        proxy.run_with_iobinding(binding)
    except RuntimeError as error:
        if isinstance(error, OURS):
            raise
        raise _same_words(call, str(error)) from None
    return binding.copy_outputs_to_cpu()


ANY_WAYS: Final = (plainly, plainly, plainly, with_options, in_time, awaited, called_back)
ARRAY_WAYS: Final = (*ANY_WAYS, with_values, bound)

Way = Callable[[InferenceSessionProxy, Call], Any]


def ways(call: Call) -> Sequence[Way]:
    """Those that take such a call: onnxruntime binds no initializer that a feed overrides."""
    known = {end.name for end in zoo.reference(call.kind).get_inputs()}
    return ARRAY_WAYS if zoo.kinds()[call.kind].arrays and call.feed.keys() <= known else ANY_WAYS


def answer(proxy: InferenceSessionProxy, call: Call, way: Way) -> Any:
    """What the call gives, which is right.

    Raises:
        Wrong: it is not.
        OnnxDLError: what only happens where something was killed.
    """
    try:
        found = way(proxy, call)
    except OURS:
        raise
    except Wrong:
        raise
    except Exception as error:
        found = error
    try:
        check(call, found, way.__name__)
    except Wrong as wrong:
        raise wrong from (found if isinstance(found, Exception) else None)
    return found


def check(call: Call, found: Any, how: str) -> None:
    if (text := zoo.difference(found, call.wanted)) is not None:
        raise Wrong(f"{call.kind}, {call.outputs}, {how}, of {shapes(call.feed)}: {text}")


def shapes(feed: zoo.Feed) -> dict[str, Any]:
    return {name: getattr(value, "shape", type(value).__name__) for name, value in feed.items()}


def one(world: World, rng: random.Random, call: Call | None = None) -> str:
    """One call of anything in any way; some results are kept."""
    call = call or draw(rng, world)
    way = rng.choice(ways(call))
    found = answer(world.any_proxy(rng, call.kind), call, way)
    if not isinstance(found, Exception):
        said = f"{call.kind} by {way.__name__} of {shapes(call.feed)}"
        world.keep(found, call.wanted, said, rng)
    return f"{call.kind} {call.outputs} by {way.__name__} of {shapes(call.feed)}"


# --- steps of calls --------------------------------------------------------------------------------------


def burst(world: World, rng: random.Random) -> str:
    """The same shapes a few times, as prepared calls, with other values each time."""
    call = draw(rng, world)
    proxy, random_ = world.any_proxy(rng, call.kind), numbers(rng)
    count = rng.randint(3, 12)
    for turn in range(count):
        feed = {name: shaken(value, random_) for name, value in call.feed.items()}
        again = call._replace(feed=feed, wanted=zoo.expected(call.kind, call.outputs, feed))
        found = answer(proxy, again, plainly if turn % 4 else rng.choice(ways(call)))
        if not isinstance(found, Exception):
            world.keep(found, again.wanted, f"turn {turn} of {call.kind} of {shapes(feed)}", rng)
    return f"{count} times {call.kind} {call.outputs} of {shapes(call.feed)}"


def shaken(value: Any, rng: np.random.Generator) -> Any:
    """Other values where the caller has them, or elsewhere."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fOb" or not value.size:
        return value
    if rng.random() < 0.3:
        value = zoo.plain(value)
    if value.flags.writeable:
        value[...] = rng.permutation(value.reshape(-1)).reshape(value.shape)
        if value.dtype.kind == "f" and rng.random() < 0.3:
            value[value > 0] = 0
    return value


def feed_again(world: World, rng: random.Random) -> str:
    """A result that is kept, or a part of it, is the input of another call."""
    arrays = [a for held in world.held for a in held.value if isinstance(a, np.ndarray)]
    fit = [array for array in arrays if array.dtype == np.float32 and array.ndim == 1 and array.size]
    if not fit:
        return "nothing to feed"
    array = rng.choice(fit)
    part = rng.choice([slice(None), slice(None), slice(1, None), slice(None, None, 2), slice(None, None, -1)])
    name, given = rng.choice([("plus", "x"), ("negative", "y"), ("found", "x")])
    fed = array[part]
    if name == "found" and fed.size > zoo.kinds()[name].most:
        name, given = "plus", "x"
    outputs = some_outputs(rng, name)
    return one(world, rng, Call(name, outputs, {given: fed}, zoo.expected(name, outputs, {given: fed})))


def change(world: World, rng: random.Random) -> str:
    """The program writes to a result of its own; that is seen in this one only."""
    held = rng.choice(world.held) if world.held else None
    if held is None:
        return "nothing is kept"
    for ours, wanted in zip(held.value, held.wanted, strict=True):
        if isinstance(ours, np.ndarray) and ours.dtype.kind in "fiub":
            ours[...] = wanted[...] = rng.randrange(2)
    return held.source


def pipeline(world: World, rng: random.Random) -> str:
    """z = -(x + 3), without y in this process."""
    lane = rng.choice(["socket", "zmq"])
    line = onnx_dl.pipeline(world.proxy("plus", lane), world.proxy("negative", lane))
    size = rng.choice(zoo.SIZES)
    for _ in range(rng.randint(1, 4)):
        x = zoo.floats(numbers(rng), size)
        y = zoo.reference("plus").run(None, {"x": x})[0]
        wanted = zoo.expected("negative", None, {"y": y})
        call = Call("pipeline", None, {"x": dressed(rng, world, x)}, wanted)
        found = line.run(None, call.feed)
        check(call, found, lane)
        world.keep(found, wanted, f"a pipeline of {size}", rng)
    return f"{size} by {lane}"


def flood(world: World, rng: random.Random) -> str:
    """More shapes in a row than are remembered, and all results are kept for so long."""
    start, kept = rng.choice([5, 16_390, 70_000]), []
    proxy, random_ = world.any_proxy(rng, "plus"), numbers(rng)
    for turn in range(80):
        x = zoo.floats(random_, start + turn)
        call = Call("plus", None, {"x": x}, zoo.expected("plus", None, {"x": x}))
        kept.append((answer(proxy, call, plainly), call))
    for found, call in kept:
        check(call, found, "flood")
    return f"{start} and more"


def coroutines(world: World, rng: random.Random) -> str:
    """Several at a time in one event loop."""
    calls = [draw(rng, world) for _ in range(rng.randint(2, 6))]
    proxies = [world.any_proxy(rng, call.kind) for call in calls]

    async def all_of_them() -> list[Any]:
        pairs = zip(proxies, calls, strict=True)
        runs = (proxy.arun(call.outputs, call.feed) for proxy, call in pairs)
        return await asyncio.gather(*runs, return_exceptions=True)

    for call, found in zip(calls, asyncio.run(all_of_them()), strict=True):
        check(call, found, "gather")
        if not isinstance(found, Exception):
            world.keep(found, call.wanted, f"a coroutine of {call.kind}", rng)
    return ", ".join(call.kind for call in calls)


def steps(world: World) -> dict[str, Step]:
    """By kind."""
    own = {
        "call": one, "burst": burst, "feed": feed_again, "change": change, "pipeline": pipeline,
        "flood": flood, "coroutines": coroutines, "look": lambda world, rng: world.look(),
    }  # fmt: skip
    made = {**own, **faults.STEPS}

    def bind(step: Callable[[World, random.Random], str | None]) -> Step:
        return lambda rng: step(world, rng)

    return {name: bind(step) for name, step in made.items()}
