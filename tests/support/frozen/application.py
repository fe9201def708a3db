"""What tests/system/test_frozen.py makes a frozen program of: ``application MODE MODEL``."""

import multiprocessing
import os
import sys
import threading

multiprocessing.freeze_support()
if "A_THREAD" in os.environ:
    threading.Thread(target=threading.Event().wait, daemon=True).start()
import onnx_dl  # noqa: E402

if sys.argv[1] != "forgets":
    onnx_dl.freeze_support()

import contextlib  # noqa: E402
import json  # noqa: E402
import signal  # noqa: E402

from using import X, send, use  # noqa: E402


def private(model: str) -> object:
    """Loads, a crash, a second model."""
    proxy = onnx_dl.InferenceSessionProxy(model, providers=["CPUExecutionProvider"])
    results = []
    for _ in range(3):
        results.append(float(proxy.run(None, X)[0][0]))
        proxy.unload()
    proxy.load()
    (status,) = onnx_dl.default_host().snapshot().models
    os.kill(status.pid, signal.SIGKILL)
    with contextlib.suppress(onnx_dl.WorkerDied):
        proxy.run(None, X)
    results.append(float(proxy.run(None, X)[0][0]))
    return [*results, use(model, max_runs=9)]


def forgets(model: str) -> object:
    try:
        use(model)
    except onnx_dl.OnnxDLError as error:
        return type(error).__name__, str(error)


def spawns(model: str) -> object:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=send, args=(model, theirs))
    child.start()
    theirs.close()
    result = ours.recv()
    child.join()
    return result


def shared(model: str) -> object:
    host = onnx_dl.connect("frozen")
    return use(model, host=host), host.snapshot().supervisor_pid


def programs(model: str) -> object:
    """What the processes run."""
    with onnx_dl.InferenceSessionProxy(model, providers=["CPUExecutionProvider"]) as proxy:
        result = float(proxy.run(None, X)[0][0])
        host = onnx_dl.default_host().snapshot()
        pids = host.supervisor_pid, host.models[0].pid
        return result, [os.readlink(f"/proc/{pid}/exe") for pid in pids]


def waits(model: str) -> object:
    print(json.dumps([use(model), os.getpid()]), flush=True)
    sys.stdin.read()


MODES = {function.__name__: function for function in (private, forgets, spawns, shared, programs, waits)}

if __name__ == "__main__":
    print("begins", flush=True)
    print(json.dumps(MODES[sys.argv[1]](sys.argv[2])))
