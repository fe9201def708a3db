"""Hosts that several applications share: found or started once, left by the dead, replaced under clients."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import onnx_dl
from onnx_dl import (
    ConfigError,
    EventType,
    InferenceSessionProxy,
    ModelHost,
    SupervisorDied,
    SupervisorError,
    SupervisorStartError,
    WorkerDied,
)
from onnx_dl.client import host_registry, launcher, supervisor_link
from onnx_dl.client.connection import Connection, ConnectionListener
from onnx_dl.client.lane_pool import LanePool
from onnx_dl.client.supervisor_link import FAREWELL
from onnx_dl.client.worker_output import WorkerOutput
from onnx_dl.protocol.codec import PROTOCOL_VERSION
from onnx_dl.transport.rendezvous import HostEntry
from tests.contract.both import CPU, scaled
from tests.support.sharing import Forked, Kept, belonging, command, own_runtime
from tests.support.slow import spin_model
from tests.support.waiting import DEADLINE, allowed, eventually, is_gone, is_process, wait_for, worker_pid

pytestmark = pytest.mark.slow

FOR_EVER = np.array(10**9)
LISTENER = ConnectionListener(print, print, bool)
X = np.eye(64, dtype=np.float32)


@pytest.fixture(autouse=True)
def runtime(nothing_is_left_behind: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with own_runtime(monkeypatch) as folder:
        yield folder


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "twice.onnx").write_bytes(scaled())
    return str(tmp_path / "twice.onnx")


@pytest.fixture
def spinning(tmp_path: Path) -> str:
    (tmp_path / "spin.onnx").write_bytes(spin_model())
    return str(tmp_path / "spin.onnx")


@pytest.fixture
def kept() -> Iterator[Kept]:
    """A host in the foreground."""
    host = Kept()
    yield host
    if host.process.poll() is None:
        host.end()


def twice(proxy: InferenceSessionProxy, value: float = 1.0) -> float:
    return float(proxy.run(["twice"], {"x": np.full((1, 1), value, np.float32)})[0][0, 0])


def supervisor_pid(host: ModelHost) -> int:
    pid = host.snapshot().supervisor_pid
    assert pid is not None
    return pid


def leases(host: ModelHost) -> list[int]:
    return [status.leases for status in host.snapshot().models]


class Threads:
    """Calls in threads of their own, and what became of them."""

    def __init__(self, *works: Callable[[], Any]) -> None:
        self.results: list[Any] = [None] * len(works)
        self._threads = [threading.Thread(target=self._run, args=pair) for pair in enumerate(works)]
        for thread in self._threads:
            thread.start()

    def _run(self, index: int, work: Callable[[], Any]) -> None:
        try:
            self.results[index] = work()
        except Exception as error:
            self.results[index] = error

    def join(self, timeout: float = 3 * DEADLINE) -> list[Any]:
        deadline = time.monotonic() + allowed(timeout)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            assert not thread.is_alive(), "a call hangs"
        return self.results


def begun(host: ModelHost) -> None:
    """Returns when a call runs."""
    eventually(lambda: any(status.busy for status in host.snapshot().models), "a call runs")


# --- one host, one copy ------------------------------------------------------------------------------------


def test_several_applications_share_one_copy(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever names it, and however; parent and forked children call at the same time."""
    monkeypatch.setenv("ONNX_DL_HOST", "mine")
    monkeypatch.setattr(host_registry, "_default", None)
    by_default = InferenceSessionProxy(path, providers=CPU)
    by_name = onnx_dl.connect("mine").open(path, providers=CPU)
    assert [twice(by_default), twice(by_name)] == [2, 2]
    read, write = os.pipe()

    def work(number: int) -> Callable[[], list[Any]]:
        def calls() -> list[Any]:
            os.close(write)
            os.read(read, 1)  # all at the same time
            right = all(twice(by_default, number * 1000 + i) == 2 * (number * 1000 + i) for i in range(100))
            return [right, supervisor_pid(by_default._handle.host), worker_pid(by_default._handle.host)]

        return calls

    children = [Forked(work(number)) for number in range(1, 4)]
    os.close(write)
    host = by_default._handle.host
    assert host is by_name._handle.host and host.name == host.snapshot().host == "mine"
    assert all(twice(by_default, i) == 2 * i for i in range(100))
    os.close(read)
    expected = [True, supervisor_pid(host), worker_pid(host)]
    assert [child.result() for child in children] == [expected] * 3
    (status,) = host.snapshot().models
    assert status.loads == 1
    eventually(lambda: leases(host) == [2], "the children's leases are given back")
    monkeypatch.setattr(host_registry, "_default", None)


def test_a_program_of_its_own_finds_it(path: str, runtime: Path) -> None:
    host = onnx_dl.connect("mine")
    mine = host.open(path, providers=CPU)
    assert twice(mine) == 2
    program = f"""
import numpy as np, onnx_dl
proxy = onnx_dl.InferenceSessionProxy({path!r}, providers=["CPUExecutionProvider"])
print(proxy.run(["twice"], {{"x": np.full((1, 1), 21, np.float32)}})[0][0, 0])
print(onnx_dl.default_host().snapshot().supervisor_pid, onnx_dl.default_host().snapshot().models[0].pid)
"""
    environment = {name: text for name, text in os.environ.items() if name not in ("HOME", "XDG_RUNTIME_DIR")}
    environment |= {"ONNX_DL_HOST": "mine"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.stderr == ""
    assert done.stdout.split() == ["42.0", str(supervisor_pid(host)), str(worker_pid(host))]
    eventually(lambda: leases(host) == [1], "its lease is given back")


def test_a_long_temporary_folder_and_no_home_to_write_to(path: str) -> None:
    """Without a login, too: a real run in what cron or a container may be."""
    with tempfile.TemporaryDirectory(prefix="odl") as name:
        long = Path(name) / ("t" * 120) / ("u" * 120)
        long.mkdir(parents=True)
        program = f"""
import os, numpy as np, onnx_dl
host = onnx_dl.connect("mine")
proxy = host.open({path!r}, providers=["CPUExecutionProvider"])
print(proxy.run(["twice"], {{"x": np.full((1, 1), 21, np.float32)}})[0][0, 0], os.listdir({str(long)!r}))
host.stop()
"""
        unset = ("XDG_RUNTIME_DIR", "ONNX_DL_RUNTIME_DIR", "ONNX_DL_CACHE")
        environment = {k: v for k, v in os.environ.items() if k not in unset}
        environment |= {"HOME": "/proc/none", "TMPDIR": str(long)}
        (Path(name) / "sitecustomize.py").write_text(NO_LOGIN)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [name, os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment
        )
        assert (done.stdout, done.stderr) == (f"42.0 ['onnx-dl-{os.getuid()}']\n", "")


NO_LOGIN = """
import os
real = os.path.isdir
os.path.isdir = lambda path: not str(path).startswith("/run/user/") and real(path)
"""


@pytest.mark.parametrize("turn", range(3))
def test_started_exactly_once(turn: int, runtime: Path) -> None:
    read, write = os.pipe()

    def find() -> int:
        os.close(write)
        os.read(read, 1)
        return supervisor_pid(onnx_dl.connect("mine"))

    children = [Forked(find) for _ in range(5)]
    os.close(write)
    os.close(read)
    pids = [child.result() for child in children]
    assert set(pids) == {HostEntry("mine").holder()}

    def others() -> list[psutil.Process]:
        found = []
        for process in belonging(runtime):
            with contextlib.suppress(psutil.Error):
                if process.pid != pids[0] and is_process(process, "supervisor"):
                    found.append(process)
        return found

    eventually(lambda: not others(), "those that were late are gone")


def test_a_pickled_proxy_names_the_host(path: str) -> None:
    """In processes that are spawned, forked, and joblib's."""
    host = onnx_dl.connect("mine")
    proxy = host.open(path, providers=CPU)
    assert twice(proxy) == 2
    again = pickle.loads(pickle.dumps(proxy))
    assert again._handle.host is host
    expected = [worker_pid(host)] * 2
    assert spawned(proxy) == expected
    assert Forked(lambda: worker_of(pickle.loads(pickle.dumps(proxy)))).result() == expected[0]
    assert [status.loads for status in host.snapshot().models] == [1]
    stop_resource_tracker()


def spawned(proxy: InferenceSessionProxy) -> list[int]:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(worker_of, [proxy] * 2)
        pool.close()
        pool.join()
    return found


def worker_of(proxy: InferenceSessionProxy) -> int:
    """In another process: the worker that answers."""
    assert twice(proxy, 4) == 8
    return worker_pid(proxy._handle.host)


def stop_resource_tracker() -> None:
    """multiprocessing's own helper process, which would stay until pytest ends."""
    from multiprocessing import resource_tracker

    gc.collect()  # its semaphores are given back before
    with contextlib.suppress(AttributeError):
        resource_tracker._resource_tracker._stop()


def test_joblib(path: str) -> None:
    joblib = pytest.importorskip("joblib")
    loky = pytest.importorskip("joblib.externals.loky")
    host = onnx_dl.connect("mine")
    proxy = host.open(path, providers=CPU)
    assert twice(proxy) == 2
    try:
        found = joblib.Parallel(n_jobs=2, backend="loky")(joblib.delayed(worker_of)(proxy) for _ in range(4))
    finally:
        loky.get_reusable_executor().shutdown(wait=True, kill_workers=True)
        from joblib.externals.loky.backend import resource_tracker

        resource_tracker._resource_tracker._stop()
        stop_resource_tracker()
    assert found == [worker_pid(host)] * 4


# --- the dead leave nothing --------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["idle", "in a block", "in a call"])
def test_a_killed_application_gives_its_leases_back(spinning: str, path: str, where: str) -> None:
    """The model that nobody else holds unloads at once; another that is held stays."""
    host = onnx_dl.connect("mine")
    held = host.open(path, providers=CPU)
    assert twice(held) == 2
    read, write = os.pipe()

    def use() -> None:
        other = onnx_dl.connect("mine")
        another = other.open(path, providers=CPU)
        twice(another)
        proxy = other.open(spinning, providers=CPU)
        proxy.run(None, {"x": X, "n": np.array(1)})
        if where == "in a block":
            proxy.session().__enter__()
        os.write(write, b"!")
        if where == "in a call":
            proxy.run(None, {"x": X, "n": FOR_EVER})
        signal.pause()

    with host.events() as stream:
        child = Forked(use)
        os.close(write)
        assert os.read(read, 1) == b"!"
        os.close(read)
        assert sorted(leases(host)) == [1, 2]
        if where == "in a call":
            begun(host)
        child.kill()
        event = wait_for(stream, EventType.UNLOADED)
    assert (event.model, event.reason) == (spinning, "exit")
    assert leases(host) == [1]
    assert twice(held) == 2
    assert [status.loads for status in host.snapshot().models] == [1]


# --- who gets in -------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_does_not_get_in_with_the_right_secret(path: str) -> None:
    host = onnx_dl.connect("mine")
    proxy = host.open(path, providers=CPU)
    assert twice(proxy) == 2
    record = HostEntry("mine").record()
    assert record is not None

    def intrude() -> str:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        with contextlib.suppress(PermissionError):
            os.listdir(os.environ["ONNX_DL_RUNTIME_DIR"])
            return "the folder is open"
        # What checks who is at the other end is the intruder's own, too, and he leaves it out.
        import onnx_dl.transport.sockets as sockets

        sockets._check_user = lambda sock: None
        Connection(record.address, record.secret, 2.0, LISTENER, WorkerOutput())
        return "connected"

    assert Forked(intrude).result().startswith("SupervisorUnreachable")
    assert twice(proxy) == 2


def test_a_wrong_secret(path: str) -> None:
    onnx_dl.connect("mine")
    place = HostEntry("mine")
    record = place.record()
    assert record is not None
    with pytest.raises(SupervisorStartError, match="the secret is wrong"):
        Connection(record.address, "0" * 32, 2.0, LISTENER, WorkerOutput())


def test_an_open_folder_is_refused(runtime: Path) -> None:
    runtime.chmod(0o755)
    try:
        with pytest.raises(onnx_dl.PlatformError, match="open to other users"):
            onnx_dl.connect("mine")
    finally:
        runtime.chmod(0o700)


# --- the host goes, clients go on --------------------------------------------------------------------------


def restart(how: str, host: ModelHost, kept: Kept | None = None) -> None:
    """Ends the host.  One that is kept is restarted, by the next call in the background any other."""
    pid = supervisor_pid(host)
    workers = [status.pid for status in host.snapshot().models]
    if how == "stop":
        host.stop()
    else:
        os.kill(pid, getattr(signal, how))
    if kept is not None:
        kept.process.communicate(timeout=allowed(2 * DEADLINE))
        kept.start()
    # Until then a call may find the old worker.
    eventually(lambda: all(map(ended, [pid, *workers])), "the end of the old host")


def ended(pid: int) -> bool:
    """A host in the background is the child of a process that may be slow to reap it."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL", "stop"])
@pytest.mark.parametrize("source", ["path", "bytes"])
def test_calls_go_on_at_the_next_host(path: str, how: str, source: str) -> None:
    """One that was started in the background; models given as bytes are handed over again."""
    host = onnx_dl.connect("mine")
    proxy = host.open(path if source == "path" else scaled(), providers=CPU)
    assert twice(proxy) == 2
    for _ in range(2):
        before = supervisor_pid(host)
        restart(how, host)
        assert twice(proxy, 3) == 6
        assert supervisor_pid(host) != before


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL", "stop"])
def test_one_that_is_kept_is_waited_for(
    path: str, how: str, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = onnx_dl.connect()
    proxy = host.open(path, providers=CPU)
    assert twice(proxy) == 2
    first = supervisor_pid(host)
    assert first == kept.process.pid
    if how == "stop":
        restart(how, host, kept)
        assert twice(proxy) == 2
    else:
        os.kill(first, getattr(signal, how))
        kept.process.communicate(timeout=allowed(2 * DEADLINE))
        looks: list[int | None] = []
        holder = HostEntry.holder
        monkeypatch.setattr(HostEntry, "holder", lambda place: looks.append(holder(place)) or looks[-1])
        calls = Threads(lambda: twice(proxy, 3), lambda: twice(proxy, 4))
        eventually(lambda: len(looks) > 20, "clients look for it again and again")
        assert set(looks) == {None}  # and start none
        kept.start()
        assert calls.join() == [6, 8]
    assert supervisor_pid(host) == kept.process.pid != first


def test_what_runs_ends_well_and_what_waits_goes_on(spinning: str, path: str) -> None:
    """SIGTERM, while one call runs, another is about to load, and others come."""
    host = onnx_dl.connect("mine")
    slow, quick = host.open(spinning, providers=CPU), host.open(path, providers=CPU)
    slow.run(None, {"x": X, "n": np.array(1)})
    took = []
    for _ in range(3):
        seconds = time.perf_counter()
        slow.run(None, {"x": X, "n": np.array(2000)})
        took.append(time.perf_counter() - seconds)
    turns = int(2000 * 1.0 / min(took))
    before = supervisor_pid(host)
    running = Threads(lambda: slow.run(None, {"x": X, "n": np.array(turns)})[0].shape)
    begun(host)
    os.kill(before, signal.SIGTERM)
    later = Threads(*[lambda i=i: twice(quick, i) for i in range(4)])
    assert running.join() == [(64, 64)]
    assert later.join() == [0, 2, 4, 6]
    assert supervisor_pid(host) != before


def test_one_that_is_going_is_not_asked_again_and_again(
    spinning: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it lets a call end, whoever wants more waits for the next one."""
    monkeypatch.setenv("ONNX_DL_EXIT_GRACE", str(allowed(2.0)))  # for so long it is going
    host = onnx_dl.connect("mine")
    slow, quick = host.open(spinning, providers=CPU), host.open(path, providers=CPU)
    running = Threads(lambda: slow.run(None, {"x": X, "n": FOR_EVER}))
    begun(host)
    made = []
    monkeypatch.setattr(
        supervisor_link, "Connection", lambda *args: made.append(Connection(*args)) or made[-1]
    )
    os.kill(supervisor_pid(host), signal.SIGTERM)
    eventually(lambda: [s.state for s in host.snapshot().models] == ["draining"], "it is going")
    assert twice(quick) == 2
    assert len(made) == 1
    assert isinstance(running.join()[0], WorkerDied | SupervisorDied)


def test_stop_while_others_want_more(spinning: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next host is there before stop() returns, and is not taken for the one that was to end."""
    monkeypatch.setenv("ONNX_DL_EXIT_GRACE", "0.5")
    host = onnx_dl.connect("mine")
    slow, quick = host.open(spinning, providers=CPU), host.open(path, providers=CPU)
    before = supervisor_pid(host)
    running = Threads(lambda: slow.run(None, {"x": X, "n": FOR_EVER}))
    begun(host)
    began = time.monotonic()
    stop = Threads(host.stop)
    calls = Threads(*[lambda: [twice(quick) for _ in range(50)]] * 2)
    assert stop.join() == [None]
    assert time.monotonic() - began < allowed(0.5 + FAREWELL)  # nor is anything of the next one awaited
    assert calls.join() == [[2] * 50, [2] * 50]
    assert isinstance(running.join()[0], WorkerDied | SupervisorDied)
    assert ended(before)


def test_a_fate_is_asked_for_where_it_is_known(spinning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next host numbers its workers as the last one did: a call that was begun at the last one is not
    taken for one of the next, and is not made again."""
    host = onnx_dl.connect("mine")
    proxy = host.open(spinning, providers=CPU)
    moved = threading.Event()
    check_end = LanePool.check_end

    def late(self: LanePool, *args: Any) -> None:
        assert moved.wait(allowed(DEADLINE))
        check_end(self, *args)

    monkeypatch.setattr(LanePool, "check_end", late)
    running = Threads(lambda: proxy.run(None, {"x": X, "n": FOR_EVER}))
    begun(host)
    restart("SIGKILL", host)
    proxy.run(None, {"x": X, "n": np.array(1)})
    moved.set()
    assert isinstance(running.join(allowed(DEADLINE))[0], SupervisorDied)
    eventually(lambda: [status.busy for status in host.snapshot().models] == [0], "nothing runs there")


def test_who_only_watches_sees_the_next_host(path: str) -> None:
    watching = onnx_dl.connect("mine")
    restart("SIGKILL", watching)
    assert watching.snapshot().supervisor_pid is None
    assert HostEntry("mine").holder() is None  # looking starts none
    assert not watching.unload(path)

    def use() -> int:
        other = onnx_dl.connect("mine")
        other.adopt(path)
        return supervisor_pid(other)

    assert Forked(use).result() == supervisor_pid(watching)
    assert watching.unload(path)


def test_what_was_begun_raises_and_is_not_made_again(spinning: str, path: str) -> None:
    """SIGKILL: the call that runs was begun; all threads that wait at that moment go on."""
    host = onnx_dl.connect("mine")
    slow, quick = host.open(spinning, providers=CPU), host.open(path, providers=CPU)
    slow.run(None, {"x": X, "n": np.array(1)})
    eventually(lambda: not any(s.busy for s in host.snapshot().models), "its end, a moment after its answer")
    running = Threads(*[lambda: slow.run(None, {"x": X, "n": FOR_EVER})] * 2)
    eventually(lambda: [s.busy for s in host.snapshot().models] == [2], "both calls run")
    stop = threading.Event()

    def many(number: int) -> int:
        count = 0
        while not stop.is_set() or count < 20:
            with contextlib.suppress(SupervisorDied):  # of those, too, one may just have begun
                assert twice(quick, number) == 2 * number
            count += 1
        return count

    others = Threads(*[lambda i=i: many(i) for i in range(4)])
    os.kill(supervisor_pid(host), signal.SIGKILL)
    assert [type(error) for error in running.join()] == [SupervisorDied] * 2
    stop.set()
    assert all(isinstance(count, int) for count in others.join()), others.results
    assert [status.model for status in host.snapshot().models] == [path]  # the slow one was not made again


def test_threads_that_all_wait_when_the_host_dies(tmp_path: Path) -> None:
    """While their models load: nothing was begun, so that nobody gets an error."""
    host = onnx_dl.connect("mine")
    proxies = []
    for number in range(6):
        (tmp_path / f"m{number}.onnx").write_bytes(scaled())
        proxies.append(host.open(str(tmp_path / f"m{number}.onnx"), providers=CPU))
    for signal_number in (signal.SIGKILL, signal.SIGTERM):
        before = supervisor_pid(host)
        for proxy in proxies:
            proxy.unload()
        calls = Threads(*[lambda i=i: twice(proxies[i], i) for i in range(6)] * 2)
        os.kill(before, signal_number)
        results = calls.join()
        # SIGKILL may come when a load was quick and its call began.
        fine = [r == 2 * (i % 6) or isinstance(r, SupervisorDied) for i, r in enumerate(results)]
        assert all(fine), results
        assert sum(isinstance(r, SupervisorDied) for r in results) <= (signal_number == signal.SIGKILL) * 12
        assert [twice(proxy, 5) for proxy in proxies] == [10] * 6


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_a_block_over_a_restart(path: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside of it calls go on, and the new worker is held as the old one was."""
    monkeypatch.setenv("ONNX_DL_EXIT_GRACE", "0.5")  # for so long the block holds the old one
    host = onnx_dl.connect("mine")
    proxy = host.open(path, ttl=0, providers=CPU)
    with proxy.session():
        assert twice(proxy) == 2
        restart(how, host)
        assert twice(proxy) == 2
        first = worker_pid(host)
        assert [twice(proxy) for _ in range(3)] == [2] * 3
        assert worker_pid(host) == first
    eventually(lambda: not host.snapshot().models, "ttl=0 after the block")


def test_adopted_again_and_again(path: str) -> None:
    host = onnx_dl.connect("mine")
    proxy = host.open(path, providers=CPU)
    proxy.adopt()
    os.kill(supervisor_pid(host), signal.SIGKILL)
    proxy.adopt()
    proxy.close()
    assert leases(host) == [1]


# --- commands and settings ---------------------------------------------------------------------------------


def test_there_is_none_and_none_is_wanted(runtime: Path) -> None:
    with pytest.raises(
        SupervisorError, match=r"No shared host named 'mine' runs.*onnx-dl supervise --host mine"
    ):
        onnx_dl.connect("mine", start=False)
    assert HostEntry("mine").holder() is None
    done = subprocess.run(command("stop"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("onnx-dl: No shared host named 'default' runs.")


@pytest.mark.parametrize("name", ["", "a/b", "..", "x" * 65])
def test_a_bad_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="not a host name"):
        onnx_dl.connect(name)
    if name:
        monkeypatch.setenv("ONNX_DL_HOST", name)
        monkeypatch.setattr(host_registry, "_default", None)
        with pytest.raises(ConfigError, match="not a host name"):
            onnx_dl.default_host()


def test_the_second_of_a_name_leaves(kept: Kept) -> None:
    done = subprocess.run(command("supervise"), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"A host 'default' runs already (pid {kept.process.pid})" in done.stderr
    assert "onnx-dl stop" in done.stderr
    assert HostEntry("default").holder() == kept.process.pid
    assert kept.end(signal.SIGINT) == 0
    assert HostEntry("default").record() is None  # nobody waits for one that was ended by hand


def test_stop_and_what_the_host_says(path: str, kept: Kept) -> None:
    host = onnx_dl.connect(start=False)
    proxy = host.open(path, providers=CPU)
    assert twice(proxy) == 2
    done = subprocess.run(command("stop"), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    said = kept.process.communicate(timeout=allowed(DEADLINE))[0]
    assert kept.process.returncode == 0
    assert [line.split()[0] for line in said.splitlines()] == ["loading", "ready", "draining", "unloaded"]
    assert HostEntry("default").record() is None
    with pytest.raises(SupervisorError, match="No shared host"):
        twice(proxy)


def test_it_stays_for_a_while_without_clients(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not while it holds a model that it adopted."""
    monkeypatch.setenv("ONNX_DL_LINGER", "0.3")
    host = onnx_dl.connect("mine")
    pid = supervisor_pid(host)
    host.adopt(path)
    host.close()
    onnx_dl.connect("another").close()  # it has no client as well, since later, and no model
    eventually(lambda: HostEntry("another").holder() is None, "that one has ended")
    assert HostEntry("mine").holder() == pid
    host = onnx_dl.connect("mine", start=False)
    (status,) = host.snapshot().models
    assert (status.model, status.leases, status.loads) == (path, 1, 1)
    worker = worker_pid(host)
    assert host.unload(path)
    assert not host.unload(path)
    assert is_gone(worker) and not host.snapshot().models
    assert supervisor_pid(host) == pid
    host.close()
    eventually(lambda: HostEntry("mine").holder() is None, "the end of the host")
    assert HostEntry("mine").record() is None


def test_a_python_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for program, reason in (("/bin/true", "exit status 0"), ("/none", "Cannot start '/none'")):
        monkeypatch.setenv("ONNX_DL_PYTHON", program)
        host_registry._shared.clear()
        with pytest.raises(SupervisorStartError, match=f"The host 'mine' did not start.*{reason}"):
            onnx_dl.connect("mine")


def test_a_host_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With all its processes."""
    monkeypatch.setenv("ONNX_DL_START_TIMEOUT", "0.5")
    (tmp_path / "python").write_text("#!/bin/sh\nsleep 100 &\nsleep 100\n")
    (tmp_path / "python").chmod(0o700)
    monkeypatch.setenv("ONNX_DL_PYTHON", str(tmp_path / "python"))
    with pytest.raises(SupervisorStartError, match="did not start"):
        onnx_dl.connect("mine")


def test_a_host_that_ends_at_once_is_not_started_for_ever(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ONNX_DL_START_TIMEOUT", "1")
    monkeypatch.setattr(launcher, "_RESTART", 0.1)
    says_ready = "import json, os, sys; os.write(json.load(sys.stdin)['ready_fd'], b'!')"
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -Sc "{says_ready}"\n')
    (tmp_path / "python").chmod(0o700)
    monkeypatch.setenv("ONNX_DL_PYTHON", str(tmp_path / "python"))
    with pytest.raises(
        SupervisorStartError,
        match=rf"ends as soon as it is started; its log is .*mine@{PROTOCOL_VERSION}\.log",
    ):
        onnx_dl.connect("mine")


def test_a_template_that_cannot_start(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody sees the stderr of a host in the background: its log's text is in the error."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "onnxruntime.py").write_text("import os; os.write(2, b'broken on purpose\\n'); os._exit(9)")
    monkeypatch.syspath_prepend(str(broken))
    host = onnx_dl.connect("mine")
    with pytest.raises(
        WorkerDied, match=rf"(?s)the template process ended.*mine@{PROTOCOL_VERSION}\.log:.*broken on purpose"
    ):
        twice(host.open(path, providers=CPU))


def test_nobody_reads_what_a_host_says(path: str) -> None:
    kept = Kept()
    assert kept.process.stdout is not None
    kept.process.stdout.close()
    host = onnx_dl.connect()
    assert twice(host.open(path, providers=CPU)) == 2
    assert supervisor_pid(host) == kept.process.pid
    host.close()
    kept.process.send_signal(signal.SIGHUP)  # its terminal is closed
    kept.process.wait(allowed(DEADLINE))
    assert HostEntry("default").record() is None


def test_a_host_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\necho gone wrong on purpose >&2\nexit 3\n")
    (tmp_path / "python").chmod(0o700)
    monkeypatch.setenv("ONNX_DL_PYTHON", str(tmp_path / "python"))
    with pytest.raises(SupervisorStartError, match=r"(?s)exit status 3.*gone wrong on purpose"):
        onnx_dl.connect("mine")


def test_a_relative_path_is_another_applications_too(
    path: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whoever opened it, it is known by where it lies."""
    monkeypatch.setenv("ONNX_DL_HOST", "mine")
    host = onnx_dl.connect()
    assert host.name == "mine"
    monkeypatch.chdir(Path(path).parent)
    proxy = host.open(Path(path).name, providers=CPU)  # held: else the model may be gone by then
    assert twice(proxy) == 2
    assert [status.model for status in host.snapshot().models] == [path]
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert not host.unload(Path(path).name)
    assert host.unload(path)
