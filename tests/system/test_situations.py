"""Ordinary trouble: little shared memory, full disks, folders that cannot be written, long names, many
cycles, and all at once for a while."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import pytest

from onnx_dl import InferenceSessionProxy, ModelHost, WorkerDied
from onnx_dl.errors import UnloadTimeout
from tests.contract.both import CPU, I64, F, model, node, tensor
from tests.supervisor.test_application_death import assert_gone, supervisors
from tests.supervisor.test_capacity import MB, weighty
from tests.support import cgroups
from tests.support.small import plus
from tests.support.waiting import allowed, eventually, with_standby

pytestmark = pytest.mark.slow

ROOT: Final = Path(__file__).parents[2]
SECONDS: Final = float(os.environ.get("ONNX_DL_TEST_SECONDS", "8"))
"""For how long everything happens at once; 60 by hand."""

WHOLE = """
import json, os, sys, warnings
import numpy as np
from onnx_dl import InferenceSessionProxy, ModelHost
warnings.simplefilter("error")
host = ModelHost()
large, small = (InferenceSessionProxy(path, host=host) for path in sys.argv[1:3])
x = np.ones((1, 1024), np.float32)
found = [float(large.run(None, {"x": x})[0][0, 0]), float(small.run(None, {"x": np.zeros(3, "f")})[0][0])]
text = np.zeros(30_000_000, np.float32)
found.append(float(small.run(None, {"x": text})[0][-1]))
large.unload()
found.append(float(large.run(None, {"x": x})[0][0, 0]))
host.close()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """One of 24 MB, which the load cache saves, and a small one."""
    folder = tmp_path_factory.mktemp("models")
    small = folder / "small.onnx"
    small.write_bytes(plus(5))
    yield [weighty(folder / "large.onnx", 24, 2), str(small)]
    shutil.rmtree(folder)


def works(models: list[str], *, inside: str = "", **environment: str) -> str:
    """A program that uses both models, in an environment of its own; what it said on stderr.

    Args:
        inside: shell commands that prepare a mount namespace of its own; the test is skipped where this user
            may make none.
    """
    command = [sys.executable, "-c", WHOLE, *models]
    if inside:
        if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
            pytest.skip("this user may make no mount namespace")
        command = ["unshare", "-m", "sh", "-ec", f'{inside}\nexec "$@"', "sh", *command]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [2048.0, 5.0, 5.0, 2048.0]
    return done.stderr


def tmpfs(folder: Path, size: str) -> str:
    return f"mount -t tmpfs -o size={size} tmpfs {folder}"


# --- where there is little ---------------------------------------------------------------------------------


def test_shared_memory_of_64_mb(models: list[str]) -> None:
    """A container's default: 120 MB travel all the same, because nothing of ours lies in /dev/shm."""
    assert works(models, inside=tmpfs(Path("/dev/shm"), "64m")) == ""


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "XDG_RUNTIME_DIR", "TMPDIR"])
def test_a_disk_that_is_full(variable: str, models: list[str], tmp_path: Path) -> None:
    """The load cache and the figures of models, records and logs of hosts, or other files find no room."""
    inside = f"{tmpfs(tmp_path, '64k')}\ncat /dev/zero > {tmp_path}/fill 2>/dev/null || true"
    works(models, inside=inside, **{"ONNX_DL_CACHE": "on", variable: str(tmp_path)})


def test_a_home_that_cannot_be_written(models: list[str], tmp_path: Path) -> None:
    inside = f"{tmpfs(tmp_path, '64k')}\nmount -o remount,ro {tmp_path}"
    environment = {"HOME": str(tmp_path), "ONNX_DL_CACHE": "on", "XDG_CACHE_HOME": "", "XDG_RUNTIME_DIR": ""}
    works(models, inside=inside, **environment)


def test_a_home_that_is_not_there(models: list[str]) -> None:
    works(models, HOME="/nonexistent", ONNX_DL_CACHE="on", XDG_CACHE_HOME="", XDG_RUNTIME_DIR="")


def test_names_of_temporary_files_of_120_characters(models: list[str], tmp_path: Path) -> None:
    """A socket's name may have 107."""
    folder = tmp_path / ("t" * 120)
    folder.mkdir()
    assert works(models, TMPDIR=str(folder)) == ""
    assert not list(folder.iterdir())


def test_64_descriptors(models: list[str]) -> None:
    code = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n{WHOLE}"
    done = subprocess.run(
        [sys.executable, "-c", code, *models], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_default_timeout_of_sockets(models: list[str]) -> None:
    """Programs that fetch pages set one; our waits have their own."""
    code = f"import socket; socket.setdefaulttimeout(0.001)\n{WHOLE}"
    done = subprocess.run(
        [sys.executable, "-c", code, *models], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


# --- out of memory -----------------------------------------------------------------------------------------

HUNGRY = """
import sys
import numpy as np
from pathlib import Path
from tests.support import cgroups
from onnx_dl import InferenceSessionProxy, ModelHost, WorkerDied
cgroups.enter(Path(sys.argv[1]))
mine = np.ones(200 << 20, np.uint8)  # more than the worker has when memory runs out
host = ModelHost(memory_limit="900GB")
proxy = InferenceSessionProxy(sys.argv[2], host=host)
assert proxy.run(None, {"n": np.array([8], np.int64)})[0].size == 8
try:
    proxy.run(None, {"n": np.array([60_000_000], np.int64)})
    print("it fitted")
except WorkerDied as error:
    print("died", error.signal if hasattr(error, "signal") else error)
assert proxy.run(None, {"n": np.array([8], np.int64)})[0].size == 8
assert mine.all()
host.close()
"""


def test_the_kernel_ends_the_worker_and_not_the_application(tmp_path: Path) -> None:
    """In a memory group that ends one process when memory is short.  One of cgroup v2 whose
    ``memory.oom.group`` is set, as Kubernetes does, ends all of them."""
    model = tmp_path / "hungry.onnx"
    model.write_bytes(hungry())
    with cgroups.memory_group(330 << 20) as group:
        if (single := group / "memory.oom.group").exists():
            single.write_text("0")
        done = subprocess.run(
            [sys.executable, "-c", HUNGRY, str(group), str(model)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        ended = cgroups.ended_by_kernel(group)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("died")
    assert ended in (1, 2)  # the template is the second, where the memory of the first is not free at once


def hungry() -> bytes:
    """y = n zeros of 4 bytes; n: int64[1].  So large a run takes memory of the worker."""
    nodes = [
        node("ConstantOfShape", ["n"], ["zeros"]),
        node("Exp", ["zeros"], ["ones"]),
        node("Add", ["zeros", "ones"], ["y"]),
    ]
    return model(nodes, [tensor("n", I64, [1])], [tensor("y", F, ["N"])])


# --- the end of a program ----------------------------------------------------------------------------------

ENDS = {
    "return": "pass",
    "exception": "raise RuntimeError",
    "sys.exit": "sys.exit(3)",
    "os._exit": "os._exit(3)",
    "Ctrl-C": "os.kill(os.getpid(), signal.SIGINT); signal.pause()",
    "SIGTERM": "os.kill(os.getpid(), signal.SIGTERM); signal.pause()",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_program_that_ends_inside_of_a_block(end: str, models: list[str]) -> None:
    code = f"""
import numpy as np, os, signal, sys, time
from onnx_dl import InferenceSessionProxy, default_host
proxy = InferenceSessionProxy({models[1]!r})
x = np.zeros(3, np.float32)
with proxy.session():
    proxy.run(None, {{"x": x}})
    print("supervisor", default_host().snapshot().supervisor_pid, flush=True)
    {ENDS[end]}
"""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=allowed(50), check=False
    )
    assert time.monotonic() - started < allowed(40)  # the wait was cut short
    expected = {"return": 0, "exception": 1, "sys.exit": 3, "os._exit": 3, "Ctrl-C": -2, "SIGTERM": -15}
    assert done.returncode == expected[end], done.stderr
    assert_gone(supervisors(done.stdout)[0])


# --- again and again ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_50_cycles_of_a_large_model_leave_nothing(host: ModelHost, tmp_path: Path) -> None:
    """Descriptors, threads and memory of the application and the supervisor stay as they were."""
    proxy = InferenceSessionProxy(weighty(tmp_path / "large.onnx", 100, 3), providers=CPU, host=host)
    feed = {"x": np.ones((1, 1024), np.float32)}

    def cycle() -> None:
        assert proxy.run(None, feed)[0][0, 0] == 3072
        assert proxy.unload() is True

    for _ in range(5):
        cycle()
    supervisor = with_standby(host.snapshot().supervisor_pid or 0)
    ours = psutil.Process()
    before = [_possessions(process) for process in (ours, supervisor)]
    for _ in range(50):
        cycle()
    with_standby(supervisor.pid)
    after = [_possessions(process) for process in (ours, supervisor)]
    for (files, threads, private), (files_now, threads_now, private_now) in zip(before, after, strict=True):
        assert (files_now, threads_now) == (files, threads)
        assert private_now - private < 4 * MB


def _possessions(process: psutil.Process) -> tuple[int, int, int]:
    """Descriptors, threads and bytes of its own."""
    return process.num_fds(), process.num_threads(), process.memory_full_info().uss


class Crowd:
    """Threads that call models, each of which adds a number of its own, and what came of it."""

    THREADS, MODELS = 32, 5

    def __init__(self, host: ModelHost, seed: int) -> None:
        self.host = host
        self.seed = seed
        self.proxies = [
            InferenceSessionProxy(plus(i), providers=CPU, host=host, ttl=0.05) for i in range(self.MODELS)
        ]
        self.end = time.monotonic() + SECONDS
        self.right = 0
        self.wrong: list[object] = []
        self.died = 0
        self._threads = [threading.Thread(target=self._call, args=(i,)) for i in range(self.THREADS)]
        self._threads += [threading.Thread(target=self._disturb)]

    def run(self) -> None:
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join(SECONDS + 60)
        assert not any(thread.is_alive() for thread in self._threads), "a call hangs"

    def _call(self, number: int) -> None:
        dice = random.Random(self.seed + number)
        while time.monotonic() < self.end:
            i, size = dice.randrange(self.MODELS), dice.choice([1, 3, 1000, 300_000])
            x = np.full(size, number, np.float32)
            try:
                (y,) = self.proxies[i].run(None, {"x": x})
            except WorkerDied:
                self.died += 1
                continue
            except Exception as error:
                self.wrong.append(error)
                continue
            if y.shape == x.shape and (y == number + i).all():
                self.right += 1
            else:
                self.wrong.append((number, i, size, y.shape, y[:3]))
            time.sleep(dice.choice([0, 0, 0.01, 0.1]))

    def _disturb(self) -> None:
        dice = random.Random(self.seed)
        acts: list[Callable[[InferenceSessionProxy], Any]] = [
            lambda proxy: proxy.unload(timeout=1),
            lambda proxy: proxy.unload(force=True),
            lambda proxy: self._kill(),
            lambda proxy: proxy.load(),
            lambda proxy: setattr(proxy, "ttl", dice.choice([0, 0.02, 0.05])),
            lambda proxy: self.host.snapshot(),
        ]
        while time.monotonic() < self.end:
            try:
                dice.choice(acts)(dice.choice(self.proxies))
            except (UnloadTimeout, WorkerDied):
                pass
            except Exception as error:
                self.wrong.append(error)
            time.sleep(0.05)

    def _kill(self) -> None:
        pids = [status.pid for status in self.host.snapshot().models if status.pid is not None]
        if pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(random.choice(pids), signal.SIGKILL)

    def is_right(self, number: int) -> bool:
        """Whether the model answers, and is right.  One whose workers were killed backs off."""
        try:
            (y,) = self.proxies[number].run(None, {"x": np.zeros(1, np.float32)})
        except WorkerDied:
            return False
        assert y[0] == number
        return True


@pytest.mark.slow
def test_everything_at_once() -> None:
    """32 threads, five models that expire at once and do not all fit, and somebody who unloads and kills."""
    with ModelHost(memory_limit="100MB") as host:
        crowd = Crowd(host, seed=int(os.environ.get("ONNX_DL_TEST_SEED", "1")))
        crowd.run()
        assert not crowd.wrong, crowd.wrong[:3]
        assert crowd.right > crowd.THREADS
        for number in range(crowd.MODELS):
            eventually(functools.partial(crowd.is_right, number), f"model {number} answers", 60)
