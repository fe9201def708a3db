"""Template processes that do not do what they should: real processes, a clock that the test turns."""

from __future__ import annotations

import ctypes
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import psutil
import pytest

from onnx_dl.supervisor.main import _PR_SET_CHILD_SUBREAPER, _take_in_orphans
from onnx_dl.supervisor.processes.worker_processes import WorkerProcesses
from onnx_dl.system import boot
from onnx_dl.transport.gauges import Reading
from tests.support.waiting import DEADLINE, eventually

HEAD = (
    "import json, os, socket, sys, time; channel = socket.socket(fileno=json.loads(sys.argv[3])[0]); "
    "say = lambda text: channel.send(text); "
    "from onnx_dl.protocol import codec, template; "
    "ready = codec.encode(template.TemplateReady(forkable=True)); "
)
MUTE = "time.sleep(600)"
READY_AND_MUTE = "say(ready); time.sleep(600)"
ENDS = "os._exit(3)"
ENDS_WHEN_ASKED = "say(ready); channel.recv(4096); os._exit(3)"
CLOSES = "say(ready); channel.recv(4096); channel.close(); time.sleep(600)"
NONSENSE = "say(ready); channel.recv(4096); say(b'nonsense'); time.sleep(600)"


class Rig:
    """Processes whose templates run this program, the first ``bad`` of them; later ones are as usual."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
        self.now = 0.0
        self.told: list[tuple[str, int, object]] = []
        monkeypatch.setattr(boot, "_BOOT", HEAD + program)
        self.processes = WorkerProcesses("fork", 30.0, lambda: self.now)
        self.processes.attach("nowhere", self, lambda wrote: None, self)
        monkeypatch.undo()

    # --- the witness ---

    def spawned(self, worker_id: int, pid: int) -> None:
        self.told.append(("spawned", worker_id, pid))

    def spawn_failed(self, worker_id: int, reason: str) -> None:
        self.told.append(("failed", worker_id, reason))

    def exited(self, worker_id: int, status: int, stderr: str, reading: Reading) -> None:
        self.told.append(("exited", worker_id, status))

    def saver_ended(self, status: int) -> None: ...

    def add_worker(self, worker_id: int) -> bytes:
        return b"standby"

    def forget_worker(self, worker_id: int) -> None: ...

    # --- the loop ---

    def until(self, happened: Callable[[], object], what: str) -> None:
        def turn() -> bool:
            ready = select.select(self.processes.sources(), [], [], 0)[0]
            self.processes.handle(set(ready))
            self.processes.reap()
            self.processes.on_tick()
            return bool(happened())

        eventually(turn, what, 3 * DEADLINE)

    def template(self) -> psutil.Process:
        assert self.processes.spawn_queue._template is not None
        return psutil.Process(self.processes.spawn_queue._template.pid)

    def ready(self) -> None:
        queue = self.processes.spawn_queue
        self.until(lambda: queue._template and queue._template.was_ready, "it is ready")

    def of(self, worker_id: int) -> list[tuple[str, object]]:
        return [(kind, what) for kind, who, what in self.told if who == worker_id]


@pytest.fixture(autouse=True)
def takes_in_orphans() -> Iterator[None]:
    """As the supervisor does."""
    _take_in_orphans()
    yield
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Rig]]:
    rigs: list[Rig] = []

    def one(program: str) -> Rig:
        rigs.append(Rig(monkeypatch, program))
        return rigs[-1]

    yield one
    for rig in rigs:
        for worker_id in list(rig.processes._workers):
            rig.processes.kill(worker_id)
        rig.now += 100
        rig.until(lambda rig=rig: not rig.processes._workers, "all are reaped")
        rig.processes.close()


def failure(rig: Rig, worker_id: int) -> str:
    rig.until(lambda: rig.of(worker_id), "it failed")
    ((kind, reason),) = rig.of(worker_id)
    assert kind == "failed"
    return str(reason)


def works(rig: Rig, worker_id: int) -> None:
    """The next template is a good one."""
    rig.processes.spawn(worker_id, b"w")
    rig.until(lambda: rig.of(worker_id), "a worker is there")
    assert rig.of(worker_id)[0][0] == "spawned"


@pytest.mark.parametrize(
    ("program", "said"),
    [(MUTE, "did not become ready in time"), (READY_AND_MUTE, "did not answer in time")],
    ids=["never ready", "mute when asked"],
)
def test_one_that_does_not_answer_is_ended(make: Callable[[str], Rig], program: str, said: str) -> None:
    rig = make(program)
    if program is READY_AND_MUTE:
        rig.ready()
        assert rig.processes.next_deadline() is None
    template = rig.template()
    rig.processes.spawn(1, b"w")
    assert rig.processes.next_deadline() == 30.0
    rig.now = 29.0
    rig.processes.on_tick()
    assert rig.told == [] and template.is_running()
    rig.now = 30.0
    assert re.search(rf"the template process \(pid {template.pid}\) {said}", failure(rig, 1))
    works(rig, 2)
    assert not psutil.pid_exists(template.pid)


def test_one_that_is_stopped_is_ended(make: Callable[[str], Rig]) -> None:
    rig = make(READY_AND_MUTE)
    rig.ready()
    template = rig.template()
    template.suspend()
    for worker_id in range(1, 40):  # far more than fit into the socket: nobody waits for it
        rig.processes.spawn(worker_id, b"w")
    rig.now = 40.0
    assert "did not answer in time" in failure(rig, 1)
    rig.until(lambda: rig.of(2), "the next one is asked for in another template")
    assert rig.of(2)[0][0] == "spawned"
    for worker_id in list(rig.processes._workers):
        rig.processes.kill(worker_id)


@pytest.mark.parametrize("program", [ENDS_WHEN_ASKED, CLOSES, NONSENSE], ids=["ends", "closes", "nonsense"])
def test_one_that_goes_wrong_fails_what_it_was_asked_for(make: Callable[[str], Rig], program: str) -> None:
    """What was not asked of it yet is asked of the next."""
    rig = make(program)
    rig.ready()
    rig.processes.spawn(1, b"a")
    rig.processes.spawn(2, b"b")
    assert "the template process ended with wait status" in failure(rig, 1)
    rig.until(lambda: rig.of(2), "the other")
    assert rig.of(2)[0][0] == "spawned"


def test_one_that_cannot_start_is_not_started_for_ever(make: Callable[[str], Rig]) -> None:
    rig = make(ENDS)
    rig.processes.spawn(1, b"a")
    rig.processes.spawn(2, b"b")
    for worker_id in (1, 2):
        assert "the template process ended with wait status 768" in failure(rig, worker_id)


def test_a_request_between_eof_and_its_end(make: Callable[[str], Rig]) -> None:
    """It waits for the next template."""
    rig = make(READY_AND_MUTE)
    rig.ready()
    template = rig.template()
    template.kill()
    eventually(lambda: template.status() == psutil.STATUS_ZOMBIE, "it is dead and not reaped")
    rig.processes.spawn(1, b"w")  # the channel is broken, and nobody has said so
    rig.processes.spawn(2, b"w")
    for worker_id in (1, 2):
        rig.until(lambda worker_id=worker_id: rig.of(worker_id), "a worker")
        assert rig.of(worker_id)[0][0] == "spawned"


def test_a_worker_that_is_ended_before_it_was_asked_for(make: Callable[[str], Rig]) -> None:
    rig = make(MUTE)
    rig.processes.spawn(1, b"w")
    rig.processes.kill(1)
    assert rig.of(1) == [("exited", signal.SIGKILL)]


def test_a_worker_that_is_ended_while_nobody_answers(make: Callable[[str], Rig]) -> None:
    """The template has a moment to say that it is there."""
    rig = make(READY_AND_MUTE)
    rig.ready()
    rig.processes.spawn(1, b"w")
    rig.processes.kill(1)
    assert rig.processes.next_deadline() == 1.0
    rig.now = 1.0
    assert "did not answer in time" in failure(rig, 1)


def test_workers_outlive_the_template(make: Callable[[str], Rig]) -> None:
    rig = make(ENDS)
    rig.until(lambda: rig.processes.spawn_queue._template is None, "the bad one is gone")
    works(rig, 1)
    ((_, pid),) = rig.of(1)
    template = rig.template()
    assert isinstance(pid, int) and psutil.Process(pid).ppid() == os.getpid() != template.pid
    template.kill()
    rig.until(lambda: not psutil.pid_exists(template.pid), "it is reaped")
    assert psutil.Process(pid).is_running()
    rig.processes.kill(1)
    rig.until(lambda: len(rig.of(1)) == 2, "the worker is reaped")
    assert rig.of(1)[1] == ("exited", signal.SIGKILL)


OUTLIVED = """
import os
from onnx_dl.workers.template import Template

def told(*args):
    raise BrokenPipeError  # nobody reads the worker's number any more

template = object.__new__(Template)
template._fork_again = told
print(os.getpid(), repr(template._fork_worker(None, [])), os.getpid(), flush=True)
"""


def test_what_a_template_forked_and_did_not_live_to_hear_of_is_no_second_template() -> None:
    """The process between a template and its worker ends, whatever it finds."""
    done = subprocess.run([sys.executable, "-c", OUTLIVED], capture_output=True, text=True, timeout=60)
    pid, told, again = done.stdout.split()
    assert (told, again, done.stderr) == ("''", pid, "")
