"""Steps of the fuzzer of results in which calls are disturbed: cancelled, late, killed, forked."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import functools
import gc
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from onnx_dl.errors import RunTimeout, SupervisorDied, WorkerDied
from tests.fuzz import calls as fuzz_calls
from tests.fuzz.steps import Wrong
from tests.support import zoo
from tests.support.waiting import eventually, is_gone

if TYPE_CHECKING:
    from tests.fuzz.results import World

CHILD: Final = 60
"""Seconds after which a forked child hangs."""


def threads(world: World, rng: random.Random) -> str:
    """Four threads call whatever they like, and meanwhile something is unloaded, killed or forked."""
    kind = rng.choice(["nothing", "unload", "force", "kill", "forget", "collect"])
    allowed: tuple[type[Exception], ...] = (WorkerDied,) if kind in ("force", "kill") else ()
    seeds = [rng.getrandbits(64) for _ in range(4)]

    def work(seed: int) -> None:
        own = random.Random(seed)
        for _ in range(6):
            with contextlib.suppress(*allowed):
                fuzz_calls.one(world, own)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(work, seed) for seed in seeds]
        time.sleep(rng.random() * 0.02)
        _disturb(world, rng, kind)
        for one in running:
            one.result()
    return kind


def _disturb(world: World, rng: random.Random, kind: str) -> None:
    match kind:
        case "unload" | "force":
            world.any_proxy(rng).unload(force=kind == "force")
        case "kill":
            _kill_a_worker(world, rng)
        case "collect":
            gc.collect()


def _kill_a_worker(world: World, rng: random.Random) -> str:
    host = world.hosts[rng.choice(list(world.hosts))]
    workers = {status.pid: status.model for status in host.snapshot().models if status.pid is not None}
    if not workers:
        return "no worker"
    pid = rng.choice(sorted(workers))
    os.kill(pid, rng.choice([signal.SIGKILL, signal.SIGSEGV]))
    if rng.random() < 0.5:
        _await_end(pid)
    return f"pid {pid}, {workers[pid]}"


def _await_end(pid: int) -> None:
    eventually(lambda: is_gone(pid), f"the end of process {pid}, which was killed", CHILD)


def kill_supervisor(world: World, rng: random.Random) -> str:
    """Calls may raise SupervisorDied until this program has noticed, and are right from then on."""
    lane = rng.choice(list(world.hosts))
    pid = _supervisor_of(world, lane)
    if pid is None:
        return "none runs"
    os.kill(pid, signal.SIGKILL)
    failed = 0
    for _ in range(rng.randrange(4)):
        call = fuzz_calls.draw(rng, world)
        try:
            fuzz_calls.answer(world.proxy(call.kind, lane), call, rng.choice(fuzz_calls.ways(call)))
        except (SupervisorDied, WorkerDied):
            failed += 1
    eventually(lambda: _supervisor_of(world, lane) != pid, "a supervisor that was killed is known", CHILD)
    return f"pid {pid}, {failed} calls failed"


def _supervisor_of(world: World, lane: str) -> int | None:
    with contextlib.suppress(SupervisorDied):
        return world.hosts[lane].snapshot().supervisor_pid
    return None


def unload(world: World, rng: random.Random) -> str:
    proxy = world.any_proxy(rng)
    proxy.unload(force=rng.random() < 0.5)
    return repr(proxy)


def set_ttl(world: World, rng: random.Random) -> str:
    """Half of them after each use, so that every call loads the model."""
    proxy = world.any_proxy(rng)
    proxy.ttl = rng.choice([0, 0.02, -1, -1])
    return repr(proxy)


def session(world: World, rng: random.Random) -> str:
    """A block that holds a model; calls in it are right, whoever asks for its unload."""
    call = fuzz_calls.draw(rng, world)
    proxy = world.any_proxy(rng, call.kind)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with proxy.session():
            unloading = pool.submit(proxy.unload) if rng.random() < 0.5 else None
            for _ in range(3):
                fuzz_calls.answer(proxy, call, rng.choice(fuzz_calls.ways(call)))
        if unloading is not None:
            unloading.result()
    return call.kind


def timeout(world: World, rng: random.Random) -> str:
    """A call that is told to end, and one that may be."""
    random_ = fuzz_calls.numbers(rng)
    proxy = world.any_proxy(rng, "turns")
    try:
        proxy.run(None, zoo.forever(random_), timeout=rng.random() * 0.05)
    except RunTimeout:
        pass
    else:
        raise Wrong("A run that never ends has ended.")
    call = fuzz_calls.draw(rng, world)
    seconds = rng.random() * 0.003
    with contextlib.suppress(RunTimeout):
        fuzz_calls.answer(
            world.any_proxy(rng, call.kind),
            call,
            lambda proxy, c: proxy.run(c.outputs, c.feed, timeout=seconds),
        )
    return call.kind


def cancel(world: World, rng: random.Random) -> str:
    """A task that is cancelled somewhere on its way, beside others that are not; then the same once more."""
    call = fuzz_calls.draw(rng, world)
    proxy = world.any_proxy(rng, call.kind)
    endless = rng.random() < 0.3
    feed = zoo.forever(fuzz_calls.numbers(rng)) if endless else call.feed
    cancelled = world.any_proxy(rng, "turns") if endless else proxy
    turns, pause = rng.randrange(8), rng.random() * 0.004

    async def some() -> list[Any]:
        outputs = None if endless else call.outputs
        task = asyncio.create_task(cancelled.arun(outputs, feed))
        other = asyncio.create_task(proxy.arun(call.outputs, call.feed))
        for _ in range(turns):
            await asyncio.sleep(0)
        if turns % 2:
            await asyncio.sleep(pause)
        task.cancel()
        return await asyncio.gather(task, other, return_exceptions=True)

    first, second = asyncio.run(some())
    if not isinstance(first, asyncio.CancelledError) and not endless:
        fuzz_calls.check(call, first, "cancelled too late")
    fuzz_calls.check(call, second, "beside one that is cancelled")
    for _ in range(2):
        fuzz_calls.answer(proxy, call, fuzz_calls.plainly)
    return f"{'turns' if endless else call.kind} after {turns} turns"


# --- forks -----------------------------------------------------------------------------------------------


def fork(world: World, rng: random.Random) -> str:
    """A child that ends, writes to what it has, or calls models itself."""
    kinds = rng.sample(["write", "call", "collect", "exit"], rng.randint(0, 3))
    lane = rng.choice(list(world.hosts))
    call = fuzz_calls.draw(rng, world)  # what is wanted is asked of onnxruntime in the parent
    await_child(fork_child(lambda: _child(world, rng, kinds, call, lane)), f"A child that does {kinds}")
    world.look()
    return ", ".join(kinds) or "nothing"


def fork_busy(world: World, rng: random.Random) -> str:
    """Children of a program whose other threads are in calls."""
    calls = [fuzz_calls.draw(rng, world) for _ in range(2)]
    seeds = [rng.getrandbits(64) for _ in range(2)]

    def work(seed: int) -> None:
        own = random.Random(seed)
        for _ in range(8):
            fuzz_calls.one(world, own)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        running = [pool.submit(work, seed) for seed in seeds]
        for call in calls:
            time.sleep(rng.random() * 0.01)
            pid = fork_child(functools.partial(_child_calls, world, call, rng.choice(list(world.hosts))))
            await_child(pid, f"A child that calls {call.kind}")
        for one in running:
            one.result()
    return ", ".join(call.kind for call in calls)


def _child(world: World, rng: random.Random, kinds: list[str], call: fuzz_calls.Call, lane: str) -> None:
    world.look()
    if "write" in kinds:
        for _ in range(3):
            fuzz_calls.change(world, rng)
        world.look()
    if "call" in kinds:
        _child_calls(world, call, lane)
        world.look()
    if "collect" in kinds:
        world.held.clear()
        gc.collect()
    if "exit" in kinds:
        atexit._run_exitfuncs()


def _child_calls(world: World, call: fuzz_calls.Call, lane: str) -> None:
    """With a host of its own."""
    fuzz_calls.answer(world.proxy(call.kind, lane), call, fuzz_calls.plainly)


def fork_child(work: Callable[[], object]) -> int:
    """A child that does this and no more; onnxruntime's sessions would not survive a normal end."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.alarm(CHILD)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def await_child(pid: int, what: str) -> None:
    _, status = os.waitpid(pid, 0)
    if status:
        how = "hangs" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM else "is wrong"
        raise Wrong(f"{what} {how}: wait status {status}.")


STEPS: Final = {
    "threads": threads, "cancel": cancel, "timeout": timeout, "session": session, "unload": unload,
    "kill": _kill_a_worker, "kill_supervisor": kill_supervisor, "ttl": set_ttl,
    "reopen": lambda world, rng: world.forget(rng), "fork": fork, "fork_busy": fork_busy,
}  # fmt: skip
