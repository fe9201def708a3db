"""A program that gevent or eventlet has patched: greenlets wait, the others go on, and nothing hangs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.waiting import DEADLINE, allowed

pytestmark = pytest.mark.slow

PATCHED = "from gevent import monkey; monkey.patch_all()"
ORDERS = {
    "patched first": (PATCHED, "import onnx_dl"),
    "patched later": ("import onnx_dl", PATCHED),
    "without threads": ("from gevent import monkey; monkey.patch_all(thread=False)", "import onnx_dl"),
    "over ZeroMQ": ("import os; os.environ['ONNX_DL_LANE'] = 'zmq'", PATCHED, "import onnx_dl"),
}

PROGRAM = """
import onnx_dl, gevent, gevent.event, contextlib, os, threading, time
import numpy as np
import onnxruntime
from onnx_dl import InferenceSessionProxy, RunTimeout
from tests.contract.both import CPU, loop
from tests.contract.test_async_contract import ENDLESS
from tests.support.slow import identity_model, spin_model

host = onnx_dl.default_host()
spin = InferenceSessionProxy(spin_model(), providers=CPU)
echo = InferenceSessionProxy(identity_model(), providers=CPU)
endless = InferenceSessionProxy(loop(), providers=CPU)
x = {"x": np.ones(3, np.float32)}
beats = []

def heart():
    while True:
        beats.append(time.perf_counter())
        gevent.sleep(0.005)

gevent.spawn(heart)

def delayed():
    "Seconds that threads of this process have wanted to run, and others had the processors."
    seconds = 0.0
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError, IndexError):
            seconds += int(open(f"/proc/self/task/{thread}/schedstat").read().split()[1]) / 1e9
    return seconds

def meanwhile(wait):
    "Other greenlets go on while this one waits."
    before = delayed()
    begun = time.perf_counter()
    beats[:] = [begun]
    result = wait()
    beats.append(ended := time.perf_counter())
    pause = max(after - before for before, after in zip(beats, beats[1:]))
    busy = max(0.0, delayed() - before)
    print(f"{wait.__name__}: {ended - begun:.2f} s, {len(beats)} beats, longest pause {1000 * pause:.0f} ms")
    # Many, and none as long as what is waited for: a machine that is busy has pauses of its own.
    assert len(beats) > 4 and pause < (ended - begun) / 2 + busy, (wait, busy)
    return result

def feed(turns):
    return {"x": np.ones((64, 64), np.float32), "n": np.array(turns)}

def half_a_second():
    "So many turns take so long."
    spin.run(None, feed(1))
    fastest = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        spin.run(None, feed(2000))
        fastest = min(fastest, time.perf_counter() - begun)
    return feed(int(0.5 / fastest * 2000))

def fails(kind, call):
    try:
        call()
    except kind:
        return
    raise AssertionError(kind)

def is_free(proxy):
    "No call is left in the worker: it would wait for that."
    assert proxy.unload(timeout=8 * PATIENCE)

meanwhile(host.start)
endless.load()
long = half_a_second()

def run():
    return spin.run(None, long)
def four():
    return [g.get() for g in [gevent.spawn(spin.run, None, long) for _ in range(4)]]
assert meanwhile(run)[0].shape == (64, 64)
assert len(meanwhile(four)) == 4

def late():
    fails(RunTimeout, lambda: endless.run(None, ENDLESS, timeout=0.3))
def killed():
    caller = gevent.spawn(endless.run, None, ENDLESS)
    gevent.sleep(0.3)
    caller.kill()
def timed_out():
    with gevent.Timeout(0.3, False):
        endless.run(None, ENDLESS)
        raise AssertionError
def terminated():
    options = onnxruntime.RunOptions()
    gevent.spawn_later(0.3, setattr, options, "terminate", True)
    fails(Exception, lambda: endless.run(None, ENDLESS, options))
for end in (late, killed, timed_out, terminated):
    meanwhile(end)
    is_free(endless)
    endless.load()

def many():
    def call(i):
        return echo.run(None, {"x": np.full(3, i, np.float32)})[0][0]
    return [call.get() for call in [gevent.spawn(call, i) for i in range(50)]]
assert many() == list(range(50))

def events():
    with host.events() as stream:
        first = gevent.spawn(stream.get)
        gevent.sleep(0.05)
        echo.unload()
        return first.get(timeout=8 * PATIENCE)
assert meanwhile(events).model

def waits_for_a_block():
    def block(begun):
        with spin.session():
            begun.set()
            gevent.sleep(0.3)
    begun = gevent.event.Event()
    gevent.spawn(block, begun)
    begun.wait()
    return spin.unload()
assert meanwhile(waits_for_a_block)

def called_back():
    heard = []
    spin.run_async(None, long, lambda *result: heard.append((result, threading.get_native_id())), "mine")
    while not heard:
        gevent.sleep(0.005)
    return heard[0]
(results, mine, error), thread = meanwhile(called_back)
assert (results[0].shape, mine, error) == ((64, 64), "mine", "") and thread != threading.get_native_id()

def in_threads():
    pool = gevent.get_hub().threadpool
    return [call.get()[0][0] for call in [pool.spawn(echo.run, None, x) for _ in range(4)]]
assert in_threads() == [1] * 4

def preloaded():
    host.preload([spin, echo])
preloaded()
assert len(host.snapshot().models) == 3

def forked():
    waiting = gevent.spawn(fails, onnx_dl.SupervisorDied, lambda: endless.run(None, ENDLESS))
    gevent.sleep(0.05)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            waiting.get(timeout=8 * PATIENCE)  # has nobody to wait for here
            status = 0 if echo.run(None, x)[0][0] == 1 else 2
            host.close()
        finally:
            os._exit(status)
    status = os.waitpid(pid, 0)[1]
    assert not waiting.dead
    waiting.kill()
    return status
assert meanwhile(forked) == 0
assert echo.run(None, x)[0][0] == 1
onnx_dl.warm_up().join()
host.close()
assert echo.run(None, x)[0][0] == 1
print("well")
"""


def ran(*lines: str) -> subprocess.CompletedProcess[str]:
    patience = f"PATIENCE = {allowed(1.0)}"
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", "\n".join((*lines, patience, PROGRAM))],
        capture_output=True,
        text=True,
        timeout=allowed(8 * DEADLINE),
        check=False,
    )


@pytest.mark.parametrize("order", ORDERS)
def test_greenlets_wait_and_others_go_on(order: str) -> None:
    pytest.importorskip("gevent")
    done = ran(*ORDERS[order])
    print(done.stdout)
    assert (done.returncode, done.stdout.endswith("well\n")) == (0, True), done.stderr + done.stdout


UNPATCHED = """
import gevent, numpy as np
from onnx_dl import InferenceSessionProxy
from tests.support.slow import identity_model
proxy = InferenceSessionProxy(identity_model(), providers=["CPUExecutionProvider"])
calls = [gevent.spawn(lambda i=i: proxy.run(None, {"x": np.full(3, i, "f")})[0][0]) for i in range(20)]
assert [call.get() for call in calls] == list(range(20))
print("well")
"""


def test_greenlets_in_a_program_that_is_not_patched() -> None:
    pytest.importorskip("gevent")
    done = subprocess.run([sys.executable, "-c", UNPATCHED], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("well\n", "")


EVENTLET = """
import eventlet; eventlet.monkey_patch()
import numpy as np, onnx_dl
from tests.support.slow import identity_model
proxy = onnx_dl.InferenceSessionProxy(identity_model(), providers=["CPUExecutionProvider"])
try:
    proxy.run(None, {"x": np.ones(3, "f")})
except onnx_dl.PlatformError as error:
    print(error)
"""


def test_eventlet_is_refused_by_name() -> None:
    pytest.importorskip("greenlet")
    if subprocess.run([sys.executable, "-W", "ignore", "-c", "import eventlet"], check=False).returncode:
        pytest.skip("eventlet is not installed")
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", EVENTLET], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout.startswith("eventlet has patched this program"), done.stderr
