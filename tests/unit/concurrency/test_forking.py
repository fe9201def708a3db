"""Locks and waits of an application: free in a forked child, and no thread waits for itself."""

from __future__ import annotations

import ast
import gc
import os
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from onnx_dl import ModelHost, ReentrantUse
from onnx_dl.concurrency import forking as f
from onnx_dl.concurrency.background import Background
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.concurrency.spawning import Thread
from onnx_dl.errors import SupervisorDied
from tests.support.waiting import DEADLINE, allowed
from tests.unit.test_layers import MODULES

# --- what is used ------------------------------------------------------------------------------------------

OURS = ("supervisor", "workers", "demo", "cli", "server")
"""Run in processes of our own, or are programs: no user's code interrupts them, and nobody forks them."""
LOCKS = {
    "threading": {"Lock", "RLock", "Condition", "Event", "Semaphore", "BoundedSemaphore", "Barrier", "Timer"},
    "_thread": {"allocate_lock", "RLock", "LockType"},
    "queue": {"Queue", "LifoQueue", "PriorityQueue"},
    "concurrent.futures": {"Future", "ThreadPoolExecutor"},
    "concurrent": {"futures"},
    "multiprocessing": {"Lock", "RLock", "Condition", "Event", "Queue"},
    "weakref": {"WeakSet"},  # to go through one fails while another thread adds to it
}
ALLOWED = {
    "concurrency.primitives": {"_thread.RLock", "_thread.allocate_lock"},  # where forking.py has them from
    "integrations.onnxruntime_patch": {"weakref.WeakSet"},  # never gone through
    "ort.recordings": {"weakref.WeakSet"},
    "transport.sockets": {"weakref.WeakSet"},
    "transport.doorbell": {"weakref.WeakSet"},
}


def used(tree: ast.AST) -> Iterator[str]:
    """Dotted names, as written, and what is imported from elsewhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[0] not in OURS])
def test_every_lock_of_an_application_is_a_guard(name: str) -> None:
    forbidden = {f"{module}.{kind}" for module, kinds in LOCKS.items() for kind in kinds}
    tree = ast.parse(MODULES[name].read_text())
    found = {word for word in used(tree) if word in forbidden}
    assert found - ALLOWED.get(name, set()) == set(), "use what onnx_dl.concurrency.forking has"


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_a_cached_property(name: str) -> None:
    """Python 3.11 has one lock for all instances."""
    assert "cached_property" not in MODULES[name].read_text().replace("``functools.cached_property``", "")


def parts(thing: Any) -> Iterator[tuple[str, Any]]:
    yield from getattr(thing, "__dict__", {}).items()
    for cls in type(thing).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for slot in [slots] if isinstance(slots, str) else slots:
            if slot not in ("__dict__", "__weakref__"):
                yield slot, getattr(thing, slot, None)


def locks_of_others() -> set[str]:
    """Locks that things of ours hold and that forking.py knows nothing of."""
    kinds = (type(threading.Lock()), type(threading.RLock()), threading.Condition, threading.Event)
    found = set()
    for thing in gc.get_objects():
        if isinstance(thing, types.ModuleType):
            name = thing.__name__
        else:
            name = f"{type(thing).__module__}.{type(thing).__qualname__}"
        if not name.startswith("onnx_dl.") or name.split(".")[1] in OURS or isinstance(thing, f.Promise):
            continue
        for attribute, value in list(parts(thing)):
            if isinstance(value, kinds) and not isinstance(value, f.Guard):
                found.add(f"{name}.{attribute}")
    return found


def test_no_living_object_has_another_lock() -> None:
    with ModelHost() as host, host.events():
        assert host.empty(100_000).nbytes
        assert locks_of_others() == set()
        host.another = threading.Lock()  # type: ignore[attr-defined]
        assert locks_of_others() == {"onnx_dl.host.model_host.ModelHost.another"}


# --- in a child --------------------------------------------------------------------------------------------


def in_child(work: Callable[[], bool]) -> bool:
    """What ``work`` returns in a forked child; it has ten seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of fork beside threads
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            done: list[bool] = []
            thread = threading.Thread(target=lambda: done.append(work()), daemon=True)
            thread.start()
            thread.join(allowed(DEADLINE))
            status = 0 if done == [True] else 1
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1] == 0


class Elsewhere:
    """Another thread, inside of a context."""

    def __init__(self, context: Any) -> None:
        self._inside, self._leave = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._be_inside, args=(context,))
        self._thread.start()
        assert self._inside.wait(allowed(DEADLINE))

    def _be_inside(self, context: Any) -> None:
        with context:
            self._inside.set()
            assert self._leave.wait(60)

    def leave(self) -> None:
        self._leave.set()
        self._thread.join()


def test_a_guard_is_free_in_a_child() -> None:
    guard = f.Guard()
    other = Elsewhere(guard)
    assert in_child(lambda: guard.acquire(timeout=5))
    assert not guard.acquire(blocking=False)
    other.leave()
    assert in_child(lambda: guard.acquire(timeout=5))


def test_a_guard_is_kept_by_the_thread_that_forks() -> None:
    guard = f.Guard()
    with guard:
        assert in_child(lambda: not guard.acquire(blocking=False))
        assert guard.is_mine


def test_a_promise_is_broken_in_a_child() -> None:
    def fails() -> bool:
        with pytest.raises(SupervisorDied, match="forked"):
            open_.result()
        return given.result() == 7

    open_, given = f.Promise[int](), f.Promise[int]()
    given.set_result(7)
    assert in_child(fails)
    assert not open_.done()


def test_no_other_thread_forks_what_is_to_be_still() -> None:
    order: list[str] = []
    other = Elsewhere(f.still())

    def fork() -> None:
        assert in_child(lambda: True)
        order.append("forked")

    forks = threading.Thread(target=fork)
    forks.start()
    with f.still():  # two may be, also while somebody waits to fork
        order.append("left")
    other.leave()
    forks.join()
    assert order == ["left", "forked"]
    assert not f._still and not f._forking


def test_a_thread_may_fork_what_it_keeps_still() -> None:
    with f.still():
        assert in_child(lambda: len(f._still) == 1)
    assert not f._still


# --- re-entrance -------------------------------------------------------------------------------------------


def test_a_guard_is_not_entered_twice() -> None:
    guard = f.Guard()
    with guard.alone():
        with pytest.raises(ReentrantUse, match="another thread"):
            guard.alone()
        with guard:
            assert guard.is_mine
    assert not guard.is_mine
    with guard.alone():
        pass


def test_nobody_waits_for_ever_for_a_thread_that_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f, "_STILL", 0.01)
    guard = f.Guard()
    other = Elsewhere(guard)
    with pytest.raises(ReentrantUse):
        guard.alone()
    other.leave()
    assert not guard.is_mine


def test_who_gives_a_promise_does_not_wait_for_it() -> None:
    promise: f.Promise[int] = f.Promise(threading.get_ident())
    with pytest.raises(ReentrantUse):
        promise.result(60)
    promise.set_result(7)
    assert promise.result() == 7


def test_a_promise_is_kept_for_all_who_wait() -> None:
    promise: f.Promise[int] = f.Promise()
    got: list[int] = []
    threads = [threading.Thread(target=lambda: got.append(promise.result())) for _ in range(8)]
    for thread in threads:
        thread.start()
    with pytest.raises(TimeoutError):
        promise.result(0.0)
    promise.set_result(7)
    for thread in threads:
        thread.join()
    assert got == [7] * 8


def test_work_does_not_wait_for_itself() -> None:
    background: Background[int]

    def work(deadline: Deadline) -> int:
        with pytest.raises(ReentrantUse):
            background.wait(None, "it")
        return 7

    background = Background(work, "work")
    assert background.wait(None, "it") == 7


def test_what_interrupts_the_start_of_a_thread_starts_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Thread):
        def start(self) -> None:
            monkeypatch.undo()
            assert background.wait(Deadline(DEADLINE), "it") == 7  # as a signal handler would
            super().start()

    background = Background(lambda deadline: 7, "work")
    monkeypatch.setattr("onnx_dl.concurrency.background.Thread", Interrupted)
    assert background.wait(Deadline(DEADLINE), "it") == 7


def test_a_listener_does_not_wait_for_the_next_event() -> None:
    from onnx_dl.client.event_dispatch import EventBus
    from tests.unit.core.test_events import made

    bus, refused = EventBus(), []

    def listener(event: object) -> None:
        assert stream.get(0) == event
        try:
            stream.get()
        except ReentrantUse as error:
            refused.append(error)

    stream = bus.stream()
    bus.listen(listener)
    assert bus.publish(made(1)) == []
    assert len(refused) == 1


class Computed:
    def __init__(self) -> None:
        self.times = 0

    @f.lazily
    def value(self) -> object:
        """Said once."""
        self.times += 1
        return object()


def test_what_is_lazy_is_computed_once_for_each() -> None:
    one, two = Computed(), Computed()
    assert one.value is one.value is not two.value
    assert (one.times, two.times) == (1, 1)
    assert Computed.value.__doc__ == "Said once."


def test_a_module_that_this_thread_imports_is_not_used_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler that comes during the import, and uses a model."""
    (tmp_path / "half_done.py").write_text(
        "from onnx_dl.concurrency.forking import importing\n"
        "from onnx_dl.errors import ReentrantUse\n"
        "try:\n    importing('half_done')\nexcept ReentrantUse as error:\n    found = str(error)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "importing half_done" in f.importing("half_done").found
