"""However an application ends, its supervisor, template and workers are gone within 3 seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from onnx_dl.demo.assets import model_path
from tests.support.waiting import eventually

pytestmark = pytest.mark.slow

LIMIT = 3.0

USE = f"""
import numpy as np, os, signal, sys, threading, time
from onnx_dl import InferenceSessionProxy, default_host
proxy = InferenceSessionProxy({str(model_path("digits"))!r})
feed = {{"pixels": np.zeros((1, 64), np.float32)}}
proxy.run(None, feed)
print("supervisor", default_host().snapshot().supervisor_pid, flush=True)
"""

ENDS = {
    "return": "",
    "exception": "raise SystemError('on purpose')",
    "sys.exit": "sys.exit(4)",
    "os._exit": "os._exit(3)",
    "SIGKILL": "os.kill(os.getpid(), signal.SIGKILL)",
    "SIGTERM": "os.kill(os.getpid(), signal.SIGTERM)",
    "abort": "os.abort()",
    "Ctrl-C": "os.kill(os.getpid(), signal.SIGINT); signal.pause()",
    "during a call": "threading.Thread(target=proxy.run, args=(None, feed)).start(); os._exit(0)",
    "inside of a block": "block = proxy.session(); block.__enter__(); os._exit(0)",
}


def run(code: str, *flags: str, stdin: str | None = None, env: dict[str, str] | None = None):
    """The code in an interpreter of its own; its stdout holds ``supervisor <pid>``."""
    command = [sys.executable, *flags] if stdin is not None else [sys.executable, *flags, "-c", code]
    environment = os.environ | (env or {})
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=60, env=environment, check=False
    )


def supervisors(text: str) -> list[int]:
    return [int(line.split()[-1]) for line in text.splitlines() if "supervisor" in line]


def abstract_sockets() -> set[str]:
    return {
        line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if "onnx-dl/" in line
    }


def all_of_ours(supervisor: int) -> list[psutil.Process]:
    """Processes of one supervisor: they are its group, whoever their parent is by now."""
    found = []
    for pid in psutil.pids():
        try:
            if os.getpgid(pid) == supervisor:
                found.append(psutil.Process(pid))
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def assert_gone(supervisor: int) -> None:
    eventually(lambda: not all_of_ours(supervisor), f"the end of group {supervisor}", LIMIT)


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_nothing_outlives_the_application(end: str) -> None:
    shm = shared_memory()
    done = run(USE + end)
    (supervisor,) = supervisors(done.stdout)
    assert_gone(supervisor)
    eventually(lambda: shared_memory() <= shm, "no shared memory has a name")


def test_everything_killed_at_one_moment_leaves_nothing() -> None:
    end = """
import psutil
supervisor = psutil.Process(default_host().snapshot().supervisor_pid)
for process in [*supervisor.children(recursive=True), supervisor]:
    process.kill()
os.kill(os.getpid(), signal.SIGKILL)
"""
    before = abstract_sockets()
    done = run(USE + end)
    assert_gone(supervisors(done.stdout)[0])
    eventually(lambda: not (abstract_sockets() - before - _live_sockets()), "no socket of ours is left")


def shared_memory() -> set[str]:
    """By the names that Python or we would give it; other programs' semaphores come and go."""
    return {name for name in os.listdir("/dev/shm") if "onnx" in name or "psm_" in name}


def _live_sockets() -> set[str]:
    """Sockets of other tests that run beside this one: those of processes that live."""
    return {connection.laddr for connection in psutil.net_connections("unix") if connection.pid}


def test_a_supervisor_that_is_killed_takes_its_workers_with_it() -> None:
    done = run(USE + "os.kill(default_host().link._process.pid, 9); os._exit(0)")
    assert_gone(supervisors(done.stdout)[0])


def test_a_forked_child_that_outlives_the_application_does_not_count() -> None:
    child = "pid = os.fork()\nif pid == 0:\n    os.close(1); os.close(2); signal.pause()\n"
    done = run(USE + child + "print('child', pid, flush=True); os.kill(os.getpid(), 9)")
    orphan = int(done.stdout.split()[-1])
    try:
        assert_gone(supervisors(done.stdout)[0])
    finally:
        os.kill(orphan, 9)


def test_the_thread_that_made_the_proxy_may_end_first() -> None:
    code = (
        "import threading\n"
        f"def main():\n    global proxy, feed\n    exec({USE!r}, globals())\n"
        "thread = threading.Thread(target=main); thread.start(); thread.join()\n"
        "print('again', proxy.run(None, feed)[0].shape)"
    )
    done = run(code)
    assert "again (1,)" in done.stdout
    assert done.stderr == ""


def test_a_forked_child_gets_a_supervisor_of_its_own() -> None:
    child = (
        "import warnings; warnings.simplefilter('ignore')\n"  # Python 3.12 warns of fork beside threads
        "pid = os.fork()\n"
        "if pid == 0:\n    proxy.run(None, feed)\n"
        "    print('child supervisor', default_host().snapshot().supervisor_pid, flush=True); sys.exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
        "proxy.run(None, feed); print('parent again')"
    )
    done = run(USE + child)
    assert "parent again" in done.stdout
    ours, childs = supervisors(done.stdout)
    assert ours != childs
    assert_gone(ours)
    assert_gone(childs)
    assert done.stderr == ""


def test_a_module_that_is_in_the_way_in_the_working_directory(tmp_path: Path) -> None:
    for name in ("json", "msgspec", "onnxruntime"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    script = tmp_path.parent / "elsewhere.py"
    script.write_text(f"import os; os.chdir({str(tmp_path)!r})\n" + USE)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


LATE_THREAD = pytest.param(
    "thread that outlives main",
    marks=pytest.mark.skipif(
        (3, 12) <= sys.version_info < (3, 12, 3),
        reason="these Pythons start no thread once the main thread has ended (cpython gh-113964)",
    ),
)


@pytest.mark.parametrize("form", ["script", "-c", "stdin", "interactive", "thread", LATE_THREAD, "exec"])
def test_user_code_runs_once_without_a_main_guard(form: str, tmp_path: Path) -> None:
    witness = tmp_path / "runs"
    code = f"open({str(witness)!r}, 'a').write('once\\n')\n" + USE
    if form == "script":
        script = tmp_path / "script.py"
        script.write_text(code)
        done = subprocess.run(
            [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False
        )
    elif form == "stdin":
        done = run("", "-", stdin=code)
    elif form == "interactive":
        done = run("", "-i", "-q", stdin=code)
    elif form.startswith("thread"):
        join = "" if "outlives" in form else "; t.join()"
        start = f"import threading; t = threading.Thread(target=exec, args=({code!r}, {{}})); t.start()"
        done = run(start + join)
    elif form == "exec":
        done = run(f"exec(compile({code!r}, 'cell', 'exec'), {{'__name__': '__main__'}})")
    else:
        done = run(code)
    assert done.returncode == 0, done.stderr
    assert_gone(supervisors(done.stdout)[0])
    assert witness.read_text() == "once\n"
