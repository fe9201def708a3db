"""After a fork, parent and child keep what they held, each its own."""

from __future__ import annotations

import pytest

from tests.support.programs import program

pytestmark = pytest.mark.slow

FORK = """
def fork(child):
    "Runs child() in a forked process while the parent goes on; returns what waits for its end."
    pid = os.fork()
    if not pid:
        try:
            child()
            sys.stdout.flush()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return lambda: os.waitpid(pid, 0)[1]

def others(n=4):
    "Later calls, which use memory again that is free."
    for i in range(n):
        run(x + 100 + i)
"""


@pytest.mark.parametrize(
    "end", ["sys.exit(0)", "held[:] = 7", "del held; gc.collect()", "os.kill(os.getpid(), 9)"]
)
def test_results_of_the_parent_stay(end: str) -> None:
    program(
        f"{FORK}\nheld = run(x)\npid = os.fork()\nif not pid:\n    {end}\n    os._exit(0)\n"
        "os.waitpid(pid, 0)\nothers()\nassert (held == x).all()\nheld += 1\nassert (held == x + 1).all()"
    )


def test_results_of_the_child_stay() -> None:
    """The parent writes to its own at once, drops it, and calls on; the child looks after that."""
    program(
        FORK
        + """
held, mine = run(x), proxy.empty(x.shape)
mine[:] = 5
read, write = os.pipe()
def child():
    os.read(read, 1)
    assert (held == x).all() and (mine == 5).all(), (held[:3], mine[:3])
    assert (run(held) == x).all() and (run(mine) == 5).all()  # by a model of its own
    default_host().close()
wait = fork(child)
held[:] = mine[:] = 9
assert (run(mine) == 9).all()
mine[:] = 8
assert (run(mine) == 8).all()
del held
others()
os.write(write, b"!")
assert wait() == 0
others()
"""
    )


def test_more_results_than_descriptors_are_kept_for() -> None:
    program(
        FORK
        + """
from onnx_dl.tensors.segment import KEPT_DESCRIPTORS
x = x[:1 << 15]
held = [run(x + i) for i in range(KEPT_DESCRIPTORS + 30)]
right = lambda: all((one == x + i).all() for i, one in enumerate(held))
read, write = os.pipe()
def child():
    os.read(read, 1)
    assert right()
    for one in held:
        one[:] = 7
wait = fork(child)
first, held[0] = held[0], x
first[:] = 3
others()
os.write(write, b"!")
assert wait() == 0
assert right()
del held
before = len(os.listdir("/proc/self/fd"))
for _ in range(3):
    fork(lambda: None)()
assert len(os.listdir("/proc/self/fd")) <= before
"""
    )


def test_children_of_children() -> None:
    program(
        FORK
        + """
held = run(x)
def child():
    held[0] = -1
    def grandchild():
        assert held[0] == -1
        held[1] = -2
    assert fork(grandchild)() == 0
    assert held[:2].tolist() == [-1, 1]
assert fork(child)() == 0
others()
assert (held == x).all()
"""
    )


def test_a_fork_takes_nothing_from_a_thread_that_writes() -> None:
    """Memory that becomes this process's own while another thread writes to it: no write is lost."""
    program(
        FORK
        + """
mine, stop, lost = proxy.empty((1 << 16,), np.int64), threading.Event(), []
mine[:] = 0
def work():
    n = 0
    while not stop.is_set():
        n += 1
        mine.__iadd__(1)
        if mine.min() != n:
            lost.append((n, mine.min()))
thread = threading.Thread(target=work)
thread.start()
for _ in range(20):
    assert fork(lambda: None)() == 0
stop.set()
thread.join()
assert not lost, lost[:3]
"""
    )


def test_what_was_held_at_forks_comes_back_to_the_system() -> None:
    program(
        FORK
        + """
def shared():
    "Bytes that application and worker share, now."
    return default_host().snapshot().models[0].usage.shared
def cycles(n):
    for _ in range(n):
        held = run(x)
        assert fork(lambda: None)() == 0
        assert (held == x).all()
        del held
        others(34)  # the worker looks through its blocks
others(34)
before = shared()
cycles(12)
assert shared() <= before + 3 * x.nbytes, (before, shared())
"""
    )


def test_initializers_that_the_application_updates() -> None:
    """A child that updates its own changes nothing for the parent's worker, and the other way round."""
    program(
        FORK
        + """
from onnx import TensorProto, helper
import onnxruntime
info = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [2])
stored = [helper.make_tensor("w", TensorProto.FLOAT, [2], [0, 0])]
add = helper.make_node("Add", ["x", "w"], ["y"])
graph = helper.make_graph([add], "g", [info("x")], [info("y")], stored)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
options = onnxruntime.SessionOptions()
kept = onnxruntime.OrtValue.ortvalue_from_numpy(np.ones(2, np.float32))
options.add_initializer("w", kept)
adds = InferenceSessionProxy(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
of = lambda: adds.run(None, {"x": np.zeros(2, np.float32)})[0].tolist()
assert of() == [1, 1]
def child():
    kept.update_inplace(np.full(2, 5, np.float32))
    assert of() == [5, 5]
    default_host().close()
assert fork(child)() == 0
assert of() == [1, 1]
kept.update_inplace(np.full(2, 3, np.float32))
assert of() == [3, 3]
"""
    )
