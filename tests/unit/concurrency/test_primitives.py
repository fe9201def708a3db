"""Threads, locks and waits are the system's own in a program that gevent has patched, and greenlets wait."""

from __future__ import annotations

import ast
import queue
import subprocess
import sys
import threading
import types
from collections.abc import Iterator

import pytest

from onnx_dl.concurrency import primitives, waits
from onnx_dl.concurrency.event_loops import present
from onnx_dl.concurrency.spawning import Thread
from onnx_dl.concurrency.waits import Mailbox
from onnx_dl.errors import ConfigError, PlatformError
from onnx_dl.system.resources import check_platform
from tests.support.waiting import DEADLINE, allowed
from tests.unit.concurrency.test_forking import OURS
from tests.unit.test_layers import MODULES

# --- what is used ------------------------------------------------------------------------------------------

PATCHED = {
    "threading": {"Thread", "Timer", "Lock", "RLock", "Event", "local", "current_thread", "get_ident"},
    "_thread": {"allocate_lock", "get_ident", "start_new_thread", "_local", "RLock"},
    "time": {"sleep"},
    "select": {"select", "poll", "epoll"},
    "selectors": {"DefaultSelector", "PollSelector", "EpollSelector", "SelectSelector"},
    "socket": {"socket", "socketpair", "create_connection", "fromfd", "SocketType"},
    "queue": {"SimpleQueue", "Queue", "LifoQueue", "PriorityQueue"},
    "subprocess": {"Popen", "run", "call", "check_call", "check_output"},
    "os": {"close", "fork", "forkpty", "waitpid", "posix_spawn", "posix_spawnp"},
}
"""What gevent replaces, and what is made of that."""
NEVER_PATCHED = OURS
"""Run in processes of our own, or are programs."""
OF_OURS = {"transport.handshakes", "transport.router", "transport.worker_lane"}
"""The ends of connections that are in processes of ours."""
ALLOWED = {
    "concurrency.primitives": {"subprocess.Popen"},
    # Close files, memory and epoll's own, where gevent does nothing else than the system.
    "client.acquisition": {"os.close"},
    "session.proxy": {"os.close"},
    "transport.rendezvous": {"os.close"},
    "system.process_setup": {"os.close"},
    "tensors.arena": {"os.close"},
    "tensors.block": {"os.close"},
    "transport.gauges": {"os.close"},
    "tensors.segment": {"os.close"},
}


class Unannotated(ast.NodeTransformer):
    """Leaves out annotations, which use nothing."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        return self.generic_visit(ast.Expr(node.value or ast.Constant(None)))

    def visit_If(self, node: ast.If) -> ast.AST:
        if ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
        return self.generic_visit(node)


def used(source: str) -> Iterator[str]:
    for node in ast.walk(Unannotated().visit(ast.parse(source))):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (f"{node.module}.*" for alias in node.names if alias.name == "*")


IN_APPLICATIONS = [n for n in MODULES if n.split(".")[0] not in NEVER_PATCHED and n not in OF_OURS]


@pytest.mark.parametrize("name", IN_APPLICATIONS)
def test_nothing_that_gevent_replaces_is_used(name: str) -> None:
    forbidden = {f"{module}.{kind}" for module, kinds in PATCHED.items() for kind in kinds}
    found = {word for word in used(MODULES[name].read_text()) if word in forbidden}
    assert found - ALLOWED.get(name, set()) == set(), (
        "see onnx_dl.concurrency.primitives and onnx_dl.concurrency.waits"
    )


def test_the_walk_sees_uses_and_no_annotations() -> None:
    source = "import time, threading\ndef f(t: threading.Thread) -> threading.Thread:\n    time.sleep(1)\n"
    assert {"time.sleep"} == set(used(source))


def gevents() -> set[str]:
    """What the installed gevent replaces in functions and classes that the lists above have to name."""
    pytest.importorskip("gevent")
    code = (
        "from gevent import monkey; monkey.patch_all()\n"
        "print(*(f'{m}.{n}' for m, names in monkey.saved.items() if isinstance(names, dict) for n in names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_list_has_all_that_this_gevent_replaces() -> None:
    known = {f"{module}.{kind}" for module, kinds in PATCHED.items() for kind in kinds}
    of_interest = {"threading", "_thread", "time", "select", "queue", "os", "subprocess"}
    missed = {name for name in gevents() - known if name.split(".")[0] in of_interest}
    # Constants, and what only threading and subprocess themselves use.
    assert {name for name in missed if not name.split(".")[1].startswith("_")} <= {
        "_thread.LockType",
        "_thread.exit",
        "_thread.stack_size",
        "subprocess.CompletedProcess",
    }


# --- without gevent ----------------------------------------------------------------------------------------


def test_without_gevent_all_is_pythons_own() -> None:
    assert primitives.SimpleQueue is queue.SimpleQueue
    assert primitives.Thread is threading.Thread
    assert waits.hub() is None
    assert waits.caller() == threading.get_ident()


def test_a_mailbox_gives_what_was_put_in_order() -> None:
    box: Mailbox[int] = Mailbox()
    threading.Thread(target=lambda: [box.put(number) for number in range(3)]).start()
    assert [box.get(allowed(DEADLINE)) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(queue.Empty):
        box.get(0.001)


def test_a_thread_knows_itself() -> None:
    seen: list[bool] = []
    thread = Thread(lambda: seen.append(thread.is_this), "test")
    thread.start()
    thread.join(allowed(DEADLINE))
    assert seen == [True]
    assert not thread.is_this


# --- eventlet ----------------------------------------------------------------------------------------------


def test_eventlet_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    patcher = types.ModuleType("eventlet.patcher")
    monkeypatch.setitem(sys.modules, "eventlet.patcher", patcher)
    patcher.already_patched = {}  # type: ignore[attr-defined]
    check_platform()
    patcher.already_patched = {"socket": True}  # type: ignore[attr-defined]
    with pytest.raises(PlatformError, match="eventlet has patched this program"):
        check_platform()


# --- coroutines --------------------------------------------------------------------------------------------


def test_a_coroutine_that_nothing_we_know_runs() -> None:
    with pytest.raises(ConfigError, match="neither asyncio nor trio"):
        present()


# --- with gevent -------------------------------------------------------------------------------------------

PATCH = "from gevent import monkey; monkey.patch_all(); "
IMPORT = (
    "import onnx_dl.concurrency.primitives as c, onnx_dl.concurrency.background; "
    "import onnx_dl.concurrency.waits as w; "
)
CHECK = """
import gevent, threading, time, sys, queue
from onnx_dl.concurrency.spawning import Thread
from onnx_dl.concurrency.background import Background
from onnx_dl.concurrency.waits import Mailbox
assert "gevent" not in repr([c.__dict__[name] for name in c.__dict__ if name[0] != "_"]), "patched"
assert "gevent" not in repr(type(c.popen(["true"])._waitpid_lock)), "patched"

beats = []
def heart():
    while True:
        beats.append(1)
        gevent.sleep(0.005)
beating = gevent.spawn(heart)

def meanwhile(wait):
    beats.clear()
    result = wait()
    assert len(beats) > 5, (wait, len(beats))
    return result

main = c.get_ident()
numbers = Background(lambda deadline: (c.sleep(0.2), c.get_ident()), "work")
assert meanwhile(lambda: numbers.wait(None, "it"))[1] != main  # a native thread

box = Mailbox()
def put():
    c.sleep(0.2)
    box.put(7)
thread = Thread(put, "put")
thread.start()
assert meanwhile(box.get) == 7
thread.join(60)
assert not thread.is_alive()
try:
    meanwhile(lambda: box.get(0.1))
except queue.Empty:
    pass

asleep = Thread(c.sleep, "sleep", (0.2,))
asleep.start()
meanwhile(asleep.join)
meanwhile(lambda: w.pause(0.2))

process = c.popen(["sleep", "0.2"])
assert meanwhile(lambda: w.ended(process, 60)) and process.returncode == 0

waiting = gevent.spawn(box.get)  # is killed, and the next one is not woken in vain
gevent.sleep(0.01)
waiting.kill()
box.put(8)
assert box.get() == 8
with gevent.Timeout(0.05, False):
    box.get()
    raise AssertionError
many = [gevent.spawn(box.get, 60) for _ in range(5)]
gevent.sleep(0.01)
Thread(lambda: [box.put(i) for i in range(5)], "put").start()
assert sorted(g.get() for g in many) == [0, 1, 2, 3, 4]
assert len({w.caller(), *(g.get() for g in [gevent.spawn(w.caller) for _ in range(2)])}) >= 2
failing = Thread(lambda: 1 / 0, "fails")
failing.start()
failing.join(60)
beating.kill()
print("done")
"""


@pytest.mark.parametrize("first", [PATCH + IMPORT, IMPORT + PATCH], ids=["patched first", "patched later"])
def test_native_threads_and_greenlets_that_wait(first: str) -> None:
    pytest.importorskip("gevent")
    done = subprocess.run(
        [sys.executable, "-c", first + CHECK], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "done\n", done.stderr
    assert "ZeroDivisionError" in done.stderr
