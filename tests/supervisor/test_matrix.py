"""Each of our processes fails in each state of a model; :mod:`tests.support.matrix` has what callers may see.

``MATRIX=full`` in the environment tries every cell; without it, each fault and each state of each process is
tried once.  In each cell: what waits ends in its bound, with its result or a typed error; another model
answers meanwhile, from the same worker; the next call is right; nothing is left.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from onnx_dl import ModelHost
from tests.support import matrix
from tests.support.matrix import Cell
from tests.support.stage import FOLDER, Misbehaving, Scene, belongings, bounded, ended, signal_order
from tests.support.waiting import DEADLINE, allowed, eventually, is_gone, template_of, with_standby

pytestmark = pytest.mark.slow

TIMEOUT = 0.4
"""Seconds that a caller waits who has a deadline, because it is to pass."""
BOUND = TIMEOUT + 1.5
"""With the grace of a run that is told to end, and a busy machine."""
CAP = 160 << 20
"""Bytes: what a worker may have that leaks, or takes too much."""
CAPS = {"leaks": {"max_memory": CAP}, "takes too much": {"max_memory_hard": CAP}}

ENDS = {"exit": 3, "SIGSEGV": signal.SIGSEGV, "SIGKILL": signal.SIGKILL, "abort": signal.SIGABRT}
"""What ends a worker, and how WorkerDied tells it."""
FALLS_OUT = ("fact nonsense", "fact in part", "fact that cannot be")
"""For what the supervisor ends it."""

FOUND = matrix.cells()


def test_the_table_is_whole() -> None:
    """What is neither in it nor left out with a reason has been forgotten."""
    left_out = matrix.left_out()
    everything = sum(len(table) * len(matrix.STATES) for table in matrix.TABLES.values())
    assert len(FOUND) + len(left_out) == everything
    assert all(left_out.values()), "each has a reason"
    assert {state for cell in FOUND for state in [matrix.STATES[cell.state]]} == {
        "unloaded",
        "loading",
        "ready",
        "draining",
        "failed",
    }
    few = matrix.covering(FOUND)
    for kind in ("fault", "state"):
        assert {(c.process, getattr(c, kind)) for c in few} == {(c.process, getattr(c, kind)) for c in FOUND}


class Stage:
    """A host that serves many cells, with a model that none of them concerns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.open()

    def open(self) -> None:
        self.host = ModelHost()
        # Pinned: a load that SIGKILL ended is made again when all that are idle have made way.
        folder = self.folder / f"other{len(os.listdir(self.folder))}"
        self.other = Misbehaving(folder, 5, self.host, pin=True)
        self.other.run()
        self.neighbour = self.other.pid()
        self.supervisor = self.host.snapshot().supervisor_pid or 0
        with_standby(self.supervisor)
        self.before = self.owned()

    def owned(self) -> tuple[int, int]:
        return belongings(self.supervisor)

    def settle(self) -> None:
        """The model of the cell is gone, and the supervisor has no more than it had.

        It has less if its standby worker ended: it makes the next one after the next load.
        """
        models = [self.other.folder.name]
        eventually(lambda: [s.model for s in self.host.snapshot().models] == models, "it is unloaded")
        eventually(self._has_no_more, "the supervisor has what it had")

    def _has_no_more(self) -> bool:
        return all(now <= before for now, before in zip(self.owned(), self.before, strict=True))

    def close(self) -> None:
        self.other.close()
        self.host.close()


@pytest.fixture(scope="module")
def orders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Processes that are started from now on misbehave on request, and give up sooner."""
    folder = tmp_path_factory.mktemp("stage")
    (folder / "orders").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("MISBEHAVING", str(folder / "orders"))
        patch.setenv("ONNX_DL_EXIT_GRACE", "0.5")
        yield folder


@pytest.fixture(scope="module")
def shared(orders: Path) -> Iterator[Stage]:
    stage = Stage(orders)
    yield stage
    stage.close()


def of(process: str) -> Any:
    few = matrix.covering(FOUND)
    cells = [cell for cell in matrix.chosen(FOUND) if cell.process == process]
    return [
        pytest.param(cell, id=str(cell), marks=[] if cell in few else [pytest.mark.slow]) for cell in cells
    ]


@pytest.mark.parametrize("cell", of("worker"))
def test_a_worker(cell: Cell, shared: Stage) -> None:
    try:
        perform(cell, shared)
    except BaseException:
        shared.close()
        shared.open()  # the next cell shall not suffer
        raise


def perform(cell: Cell, shared: Stage) -> None:
    scene = Scene(shared.host, shared.folder, CAPS.get(cell.fault, {}), *timeouts(cell))
    with scene.closing:
        scene.enter(cell.state)
        scene.misbehave(cell.fault)
        takes_effect(scene, cell)
        unaffected(shared)
        caller = scene.caller or scene.call()
        with bounded(BOUND if cell.row.timeout else DEADLINE, "the call"):
            outcome = ended(caller, DEADLINE)
        assert outcome in cell.row.caller[cell.state].split("|"), outcome
        if outcome == "died" and cell.fault in ENDS:
            error: Any = caller.exception()
            assert (error.pid, error.signal or error.exit_code) == (scene.pid, ENDS[cell.fault])
        if scene.unloader is not None:
            assert ended(scene.unloader, DEADLINE) in (cell.row.unload, "right")
        unaffected(shared)
        remedy(scene, cell)
        scene.proxy.run(DEADLINE)
    shared.settle()


def timeouts(cell: Cell) -> tuple[float | None, float | None]:
    """Of calls, and of unload().  A call that is to end well has none: a busy machine might be late."""
    timeout = TIMEOUT if cell.row.timeout else None
    return timeout if matrix.LATE in cell.row.caller[cell.state].split("|") else None, timeout


def takes_effect(scene: Scene, cell: Cell) -> None:
    """What a signal ordered is done by now, where the next call would come too early."""
    pid = scene.pid or 0
    if (cell.fault in ENDS or cell.fault in FALLS_OUT) and scene.caller is None:
        eventually(lambda: is_gone(pid), "the worker is gone")


def unaffected(stage: Stage) -> None:
    with bounded(BOUND, "a call of another model"):
        stage.other.run(DEADLINE)
    assert psutil.pid_exists(stage.neighbour or 0)


def remedy(scene: Scene, cell: Cell) -> None:
    match cell.row.remedy.get(cell.state, ""):
        case "force":
            with bounded(2.0, "unload(force=True)"):
                scene.proxy.unload(force=True)
        case "one more":
            assert ended(scene.call(), DEADLINE) == "protocol"


# --- template and supervisor -------------------------------------------------------------------------------

PATIENCE = 4.0
"""Seconds in which processes have to answer each other (ONNX_DL_START_TIMEOUT), where one is mute."""
RECOVERY = 2 * 3.0 + 3 * PATIENCE
"""Seconds within which a supervisor that neither answers nor ends is replaced."""


@pytest.fixture
def own(orders: Path, monkeypatch: pytest.MonkeyPatch, nothing_is_left_behind: None) -> Iterator[Stage]:
    monkeypatch.setenv("ONNX_DL_START_TIMEOUT", str(allowed(PATIENCE)))
    stage = Stage(orders)
    yield stage
    stage.close()


@pytest.mark.parametrize("cell", of("template"))
def test_a_template(cell: Cell, own: Stage) -> None:
    """What is loaded goes on, and the load under way; the next load has another template."""
    scene = Scene(own.host, own.folder, {})
    with scene.closing:
        scene.enter(cell.state)
        template = template_of(own.host)
        afflict(own, template.pid, cell.fault)
        unaffected(own)
        scene.go_on()
        outcomes = {ended(future, RECOVERY) for future in scene.waiting()}
        assert outcomes <= set(cell.row.caller[cell.state].split("|")), outcomes
        unaffected(own)
        fresh = Misbehaving(own.folder / f"fresh{len(os.listdir(own.folder))}", 7, own.host)
        scene.closing.callback(fresh.close)
        for proxy in (fresh, scene.proxy):
            outcome = ended(scene.threads.submit(proxy.run), RECOVERY)
            assert outcome in ("right", "died"), outcome
            if outcome == "died":  # told of the template's end, once
                proxy.run(DEADLINE)
        eventually(lambda: is_gone(template.pid), "it is reaped")
    own.settle()


@pytest.mark.parametrize("cell", of("supervisor"))
def test_a_supervisor(cell: Cell, own: Stage) -> None:
    """What runs in a worker goes on for as long as the supervisor lives; the next one serves all."""
    scene = Scene(own.host, own.folder, {}, *timeouts(cell))
    with scene.closing:
        scene.enter(cell.state)
        afflict(own, own.supervisor, cell.fault)
        if cell.row.timeout:
            unaffected(own)
        scene.go_on()
        caller = scene.caller or scene.call()
        with bounded(BOUND if cell.row.timeout else RECOVERY, "the call"):
            outcome = ended(caller, 3 * RECOVERY)
        assert outcome in cell.row.caller[cell.state].split("|"), outcome
        if scene.unloader is not None:
            assert ended(scene.unloader, RECOVERY) in cell.row.unload.split("|")
        match cell.row.remedy.get(cell.state, ""):
            case "go on":
                os.kill(own.supervisor, signal.SIGCONT)
            case "another":
                with bounded(RECOVERY, "close()"):
                    own.host.close()
        scene.proxy.run(allowed(RECOVERY))
        own.other.run(allowed(RECOVERY))
        if cell.fault != "stops":  # it, and the workers that it had
            eventually(lambda: is_gone(own.supervisor) and is_gone(own.neighbour or 0), "all are gone")


def afflict(stage: Stage, pid: int, fault: str) -> None:
    """Has a process that is no worker misbehave, from outside."""
    match fault:
        case "SIGKILL":
            os.kill(pid, signal.SIGKILL)
            eventually(lambda: not psutil.pid_exists(pid) or is_zombie(pid), "it is dead")
        case "stops":
            os.kill(pid, signal.SIGSTOP)
        case _:
            signal_order(stage.folder / "orders", pid, fault)


def is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
