"""More models than memory, at the size of real ones: five of 150 MB in 400 MB, where two fit."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_dl import CapacityError, ModelHost
from tests.supervisor.test_capacity import MB, hollow, limited, proxies, value, weighty
from tests.support import cgroups
from tests.support.memory import held_together
from tests.support.waiting import DEADLINE, allowed, is_gone

pytestmark = pytest.mark.slow

__all__ = ["limited"]  # a fixture

LIMIT, GROUP = 400_000_000, 600_000_000
COUNT, SIZE = 5, 143  # MiB each: 150 MB


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    folder = tmp_path_factory.mktemp("large")
    paths = [str(folder / f"m{i}.onnx") for i in range(COUNT)]
    _write(paths, Path(weighty(folder / "one.onnx", SIZE, 1)))
    yield paths
    for path in paths:
        Path(path).unlink()


def _write(paths: Sequence[str], one: Path) -> None:
    """Models like ``one`` with 0, 1, 2... for the 1 in its weights: faster than to make each anew."""
    content = bytearray(one.read_bytes())
    one.unlink()
    start = content.index(np.ones(1024, np.float32).tobytes())
    weights = np.frombuffer(content, np.float32, SIZE * MB // 4, start)
    for number, path in enumerate(paths):
        weights[:] = number
        Path(path).write_bytes(content)


class Watch:
    """The most that a host says is in use, and that its workers have for themselves by the kernel's account:
    bytes.  What they have of the template is the template's."""

    def __init__(self, host: ModelHost) -> None:
        self.in_use = self.taken = self.readings = 0
        self.pids: set[int] = set()
        self._host = host
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            snapshot = self._host.snapshot()
            pids = {status.pid for status in snapshot.models if status.pid is not None}
            self.in_use = max(self.in_use, snapshot.memory_in_use)
            self.taken = max(self.taken, held_together((pid, "uss") for pid in pids))
            self.pids |= pids
            self.readings += 1

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


def _ask_all(asked: Sequence[Any], seed: int, wrong: list[object]) -> None:
    """Each once, in an order of this seed's."""
    for i in random.Random(seed).sample(range(len(asked)), len(asked)):
        try:
            if (found := value(asked[i])) != 1024 * i:
                wrong.append((i, found))
        except Exception as error:
            wrong.append((i, repr(error)))


def exercise(models: Sequence[str], host: ModelHost) -> dict[str, Any]:
    """A round, then one in each of four threads at once; what went wrong, and the most that was taken."""
    asked, wrong = proxies(list(models), host), []
    with Watch(host) as watch:
        _ask_all(asked, 0, wrong)
        threads = [threading.Thread(target=_ask_all, args=(asked, seed, wrong)) for seed in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    host.close()
    return {
        "wrong": wrong,
        "in_use": watch.in_use,
        "taken": watch.taken,
        "readings": watch.readings,
        "left": [pid for pid in watch.pids if not is_gone(pid)],
        "workers": len(watch.pids),
    }


@pytest.fixture(scope="module")
def found(models: list[str]) -> dict[str, Any]:
    """What came of it: in a cgroup if one can be made, with the number of processes that the kernel ended."""
    try:
        return _in_a_group(models)
    except pytest.skip.Exception as skipped:
        return exercise(models, ModelHost(memory_limit=LIMIT)) | {"no group": str(skipped)}


def _in_a_group(models: list[str]) -> dict[str, Any]:
    with cgroups.memory_group(GROUP) as group:
        done = subprocess.run(
            [sys.executable, "-m", "tests.supervisor.test_capped_host", str(group), *models],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
        ended = cgroups.ended_by_kernel(group)
    assert done.returncode == 0, f"The kernel ended {ended} processes. {done.stderr}"
    return json.loads(done.stdout) | {"ended by the kernel": ended}


def test_every_call_gets_its_result_and_no_worker_stays(found: dict[str, Any]) -> None:
    assert found["wrong"] == [] == found["left"]
    assert found["workers"] > COUNT  # not all fit at once


def test_the_limit_holds_at_every_moment(found: dict[str, Any]) -> None:
    assert found["readings"] > 20
    assert 0 < found["in_use"] <= LIMIT
    assert 0 < found["taken"] <= LIMIT


def test_the_kernel_ends_nobody_in_a_group_of_so_much_memory(found: dict[str, Any]) -> None:
    """Application, supervisor, template and workers together stay below 600 MB, loads included."""
    if "no group" in found:
        pytest.skip(found["no group"])
    assert found["ended by the kernel"] == 0


def test_what_can_never_fit_is_refused_while_others_go_on(
    limited: Any, models: list[str], tmp_path: Path
) -> None:
    host = limited(LIMIT)
    (used,) = proxies(models[1:2], host)
    (large,) = proxies([hollow(tmp_path, 500)], host)
    wrong: list[object] = []
    assert value(used) == 1024
    with (
        _calls_going_on(used, wrong) as calls,
        pytest.raises(CapacityError, match="more than the limit") as caught,
    ):
        calls.wait(allowed(DEADLINE))
        large.run(None, {"x": np.ones((1, 1024), np.float32)})
    assert caught.value.needed > caught.value.limit == LIMIT
    assert 0 < caught.value.in_use <= LIMIT
    assert not wrong and not host.reasons()  # nobody made way for it


@contextlib.contextmanager
def _calls_going_on(proxy: Any, wrong: list[object]) -> Iterator[threading.Event]:
    """Calls of a model that gives 1024, one after another in a thread, of which the event tells the first."""
    began, stop = threading.Event(), threading.Event()

    def call() -> None:
        while not stop.is_set():
            try:
                if (found := value(proxy)) != 1024:
                    wrong.append(found)
            except Exception as error:
                wrong.append(error)
            began.set()

    thread = threading.Thread(target=call)
    thread.start()
    try:
        yield began
    finally:
        stop.set()
        thread.join(allowed(DEADLINE))


def test_who_finds_all_pinned_is_told_and_served_when_one_is_not(limited: Any, models: list[str]) -> None:
    host = limited(LIMIT)
    asked = proxies(models, host, pin=True)
    served = []
    with pytest.raises(CapacityError, match="more than pinned models leave of the limit") as caught:
        for number, proxy in enumerate(asked):
            assert value(proxy) == 1024 * number
            served.append(proxy)
    error, refused = caught.value, len(served)
    assert error.needed <= error.limit == LIMIT < error.in_use + error.needed
    assert served and all(proxy.is_loaded for proxy in served)
    served[0].close()
    assert value(asked[refused]) == 1024 * refused
    assert all(proxy.is_loaded for proxy in served[1:])


if __name__ == "__main__":
    cgroups.enter(Path(sys.argv[1]))
    print(json.dumps(exercise(sys.argv[2:], ModelHost(memory_limit=LIMIT))))
