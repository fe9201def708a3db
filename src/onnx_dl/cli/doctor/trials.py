"""Trials of ``onnx-dl doctor``, each in a process of its own, because it may crash or hang.

Each tries one thing: to import onnxruntime, to make a session with one provider, or to start a worker.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from onnx_dl.errors import SupervisorStartError
from onnx_dl.host.model_host import ModelHost
from onnx_dl.ort import onnx_builder
from onnx_dl.system import boot

_CUDA: Final = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
Report = dict[str, Any]
"""Facts that a trial found out, as JSON."""


class TrialResult(NamedTuple):
    """The result of one trial: its report if it ended well, else the failure in words; and its stderr."""

    report: Report | None
    failure: str = ""
    stderr: str = ""


def run(trial: str, *arguments: str, timeout: float, python: str = "") -> TrialResult:
    """Runs a trial: ``installed``, ``provider NAME`` or ``start``.  Failures of the trial are not raised.

    ``timeout``: seconds after which it is killed, with all that it started.
    """
    limit = f"{timeout * 0.8:.3f}"  # in seconds: limits within the trial end before the trial is killed
    limits = {"ONNX_DL_LOAD_TIMEOUT": limit, "ONNX_DL_START_TIMEOUT": limit}
    environ = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", **limits}
    try:
        launch = boot.launch("trial", trial, *arguments, python=python, environ=environ)
        done = subprocess.run(
            launch.argv, capture_output=True, timeout=timeout, check=False, env=launch.environment
        )
    except subprocess.TimeoutExpired as late:
        return TrialResult(None, f"gave no answer within {timeout:.0f} s", _text(late.stderr))
    except (OSError, SupervisorStartError) as error:
        return TrialResult(None, f"could not be started ({error})")
    return parse_output(done.returncode, _text(done.stdout), _text(done.stderr))


def parse_output(code: int, stdout: str, stderr: str) -> TrialResult:
    """The result of a process with this exit code; negative: a signal.

    The report is its last line, because native code prints on stdout, too.
    """
    if code < 0:
        return TrialResult(None, f"was killed by {_signal_name(-code)}", stderr)
    if code:
        return TrialResult(None, f"ended with exit code {code}", stderr)
    try:
        return TrialResult(json.loads(stdout.splitlines()[-1]), "", stderr)
    except (ValueError, IndexError):
        return TrialResult(None, "gave no answer", stderr)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _text(output: bytes | None) -> str:
    return (output or b"").decode(errors="replace")


# --- in the trial's process --------------------------------------------------------------------------------


def installed() -> Report:
    """Imports onnxruntime; reports its version, its build, its folder and its providers."""
    import onnxruntime
    from onnxruntime.capi import build_and_package_info as built

    return {
        "version": onnxruntime.__version__,
        "build": getattr(built, "package_name", None),
        "folder": str(Path(onnxruntime.__file__).parent),
        "providers": onnxruntime.get_available_providers(),
    }


def provider(name: str) -> Report:
    """Makes a session of one node with one provider; reports its providers and whether it computes."""
    import numpy as np
    import onnxruntime

    if name in _CUDA and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # as a worker does
    session = onnxruntime.InferenceSession(onnx_builder.one_node("Abs"), providers=[name])
    (result,) = session.run(None, {"x0": np.array([-2], np.float32)})
    return {"providers": session.get_providers(), "computes": result.tolist() == [2.0]}


def start() -> Report:
    """Starts a host with one model; reports whether the worker was forked, and the seconds of it all."""
    started = time.perf_counter()
    with (
        ModelHost() as host,
        host.open(onnx_builder.one_node("Abs"), providers=["CPUExecutionProvider"]) as proxy,
    ):
        host.start()
        before = children_of(host.snapshot().supervisor_pid or 0)
        proxy.load()
        seconds = time.perf_counter() - started
        snapshot = host.snapshot()
        (status,) = snapshot.models
        return {
            "forked": status.pid not in before,  # else the template has become the worker
            "seconds": seconds,
            "memory_limit": snapshot.memory_limit,
        }


def children_of(pid: int, proc: Path = Path("/proc")) -> set[int]:
    """The child processes of a process."""
    found = set()
    for status in proc.glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # it has just ended
            if f"\nPPid:\t{pid}\n" in status.read_text(errors="replace"):
                found.add(int(status.parent.name))
    return found


_TRIALS: Final[dict[str, Callable[..., Report]]] = {
    "installed": installed,
    "provider": provider,
    "start": start,
}


def main(trial: str, *arguments: str) -> None:
    """Runs a trial in this process and prints its report."""
    print(f"\n{json.dumps(_TRIALS[trial](*arguments))}", flush=True)
