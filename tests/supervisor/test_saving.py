"""Saves for the load cache under a memory limit, through the public API and real processes."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import psutil
import pytest
from onnx import numpy_helper

from onnx_dl import EventType, ModelHost
from onnx_dl.supervisor.policy import cache_saves
from onnx_dl.workers.load_cache.store import Cache
from tests.contract.both import F, node, tensor
from tests.supervisor.test_capacity import MB, proxies, value, weighty
from tests.support.memory import held_together
from tests.support.waiting import eventually, is_gone, is_process
from tests.workers.test_load_cache import no_saver_is_left, store

pytestmark = pytest.mark.slow

__all__ = ["store"]  # a fixture

COUNT, SIZE = 4, 40
LIMIT = 250 * MB
NEED = cache_saves.need(SIZE * MB).ram


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    return [weighty(tmp_path / f"m{i}.onnx", SIZE, i) for i in range(COUNT)]


def savers_of(supervisor: psutil.Process) -> list[psutil.Process]:
    """Its own children only: a saver forks."""
    found = []
    for process in supervisor.children():
        with contextlib.suppress(psutil.Error):
            if is_process(process, "saver"):
                found.append(process)
    return found


class Watch:
    """What was seen of a host at so many moments: bytes that it says are in use, and by the kernel
    (of each worker its own, of savers what they have together), and savers at once."""

    def __init__(self, host: ModelHost) -> None:
        self.in_use = self.taken = self.moments = 0
        self.savers: set[int] = set()
        self.at_once = 0
        self._host = host
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        supervisor = psutil.Process(self._host.snapshot().supervisor_pid)
        while not self._stop.wait(0.01):
            snapshot = self._host.snapshot()
            workers = [s.pid for s in snapshot.models if s.pid is not None]
            savers = savers_of(supervisor)
            family = [process.pid for saver in savers for process in _family(saver)]
            self.in_use = max(self.in_use, snapshot.memory_in_use)
            taken = held_together([*((pid, "uss") for pid in workers), *((pid, "pss") for pid in family)])
            self.taken = max(self.taken, taken)
            self.at_once = max(self.at_once, len(savers))
            self.savers |= {process.pid for process in savers}
            self.moments += 1

    def __enter__(self) -> Watch:
        self._host.start()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


def _family(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return [process, *process.children(recursive=True)]
    return []


def test_the_limit_holds_with_savers_and_all_is_saved_when_there_is_room(
    store: Cache, models: list[str]
) -> None:
    with ModelHost(memory_limit=LIMIT) as host, Watch(host) as watch:
        asked = proxies(models, host)
        for _ in range(2):
            for number, proxy in enumerate(asked):
                assert value(proxy) == 1024 * number
        for proxy in asked:
            proxy.unload()
        eventually(lambda: len(store.entries()) == COUNT, "all are saved", timeout=60)
        eventually(lambda: not host.snapshot().memory_in_use, "the last saver is reaped")
    assert watch.at_once == 1 and len(watch.savers) >= COUNT
    assert watch.moments > 20
    assert NEED <= watch.in_use <= LIMIT
    assert 0 < watch.taken <= LIMIT


def _stopped(supervisor: psutil.Process) -> list[psutil.Process]:
    """A saver that is at it and the process that it forked, stopped there; nobody yet: it is too early."""
    for saver in savers_of(supervisor):
        saver.suspend()
        family = [saver, *saver.children()]
        for process in family[1:]:
            process.suspend()
        if len(family) > 1 and all(map(_is_at_it, family[1:])):
            return family
        for process in family:
            process.resume()
    return []


def _is_at_it(process: psutil.Process) -> bool:
    """Whether it has worked since its fork.  One that is stopped before does not end with its parent yet."""
    return sum(process.cpu_times()[:2]) > 0.02


class Stopped(NamedTuple):
    """A host of 250 MiB, and its saver, which is at a model of 40 MiB that is loaded no more and will not go
    on by itself."""

    host: ModelHost
    family: list[int]


@pytest.fixture
def stopped(store: Cache, tmp_path: Path) -> Iterator[Stopped]:
    with ModelHost(memory_limit=LIMIT) as host:
        (proxy,) = proxies([weighty(tmp_path / "saved.onnx", SIZE, 1)], host)
        proxy.load()
        supervisor = psutil.Process(host.snapshot().supervisor_pid)
        found: list[psutil.Process] = []
        eventually(lambda: found or found.extend(_stopped(supervisor)) or found, "it saves")
        proxy.unload()
        yield Stopped(host, [process.pid for process in found])


def test_a_load_that_needs_its_room_ends_a_saver(stopped: Stopped, store: Cache, models: list[str]) -> None:
    host, family = stopped
    reasons: list[object] = []
    host.on_event(lambda event: reasons.append(event.reason) if event.type is EventType.UNLOADED else None)
    assert len(family) == 2 and host.snapshot().memory_in_use // MB == NEED // MB
    (proxy,) = proxies(models[:1], host)
    assert value(proxy) == 0  # a guess of 120 MiB, and the saver has 184
    assert all(map(is_gone, family))
    assert not reasons  # nobody was evicted
    proxy.unload()
    eventually(lambda: len(store.entries()) == 2, "both are saved after all", timeout=60)
    no_saver_is_left(host)
    assert not list(store.root.glob("unfinished-*"))


def test_a_saver_goes_with_its_host(stopped: Stopped) -> None:
    stopped.host.close()
    eventually(lambda: all(map(is_gone, stopped.family)), "they are gone")


def test_a_saver_goes_with_a_supervisor_that_is_killed(stopped: Stopped) -> None:
    os.kill(stopped.host.snapshot().supervisor_pid, 9)
    eventually(lambda: all(map(is_gone, stopped.family)), "they are gone")


def test_a_model_whose_runs_take_more_than_expected_is_saved_with_more(store: Cache, tmp_path: Path) -> None:
    """10 MiB of weights, and 150 MB in between: the first saver may take 118 MiB, the second twice that."""
    path = weighty(tmp_path / "m.onnx", 10, 1)
    made = onnx.load(path)
    made.graph.node[0].output[0] = "row"
    made.graph.node.extend([node("Tile", ["row", "times"], ["rows"]), node("ReduceMax", ["rows"], ["y"])])
    made.graph.initializer.append(numpy_helper.from_array(np.array([15_000, 1]), "times"))
    made.graph.output[0].CopyFrom(tensor("y", F, [1, 1]))
    onnx.save(made, path)
    with ModelHost() as host, Watch(host) as watch:
        proxies([path], host)[0].load()
        eventually(lambda: store.entries(), "it is saved", timeout=60)
        no_saver_is_left(host)
    assert len(watch.savers) == 2 and watch.at_once == 1
