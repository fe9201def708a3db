"""What can only be found out by trying, each thing in a process of its own that may crash or hang.

Covers the processes and what they try: importing onnxruntime, a session per provider, starting a worker.
What is to be thought of the answers is :mod:`onnx_dl.cli.doctor.checks`'s.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from onnx_dl.errors import SupervisorStartError
from onnx_dl.host.model_host import ModelHost
from onnx_dl.ort import onnx_builder
from onnx_dl.system import boot

_CUDA: Final = ("CUDAExecutionProvider", "TensorrtExecutionProvider")


class Answer(NamedTuple):
    """What came of one trial: ``said`` if it ended well, else ``failure`` in words; and its stderr."""

    said: dict[str, Any] | None
    failure: str = ""
    stderr: str = ""


def ask(trial: str, *arguments: str, timeout: float, python: str = "") -> Answer:
    """Runs a trial: ``installed``, ``provider NAME`` or ``start``.  Never raises because of what it does.

    ``timeout``: seconds after which it is killed; what it started ends with it.
    """
    environ = _environ(os.environ, timeout)
    try:
        launch = boot.launch("trial", trial, *arguments, python=python, environ=environ)
        done = subprocess.run(
            launch.argv, capture_output=True, timeout=timeout, check=False, env=launch.environment
        )
    except subprocess.TimeoutExpired as late:
        return Answer(None, f"gave no answer within {timeout:.0f} s", _text(late.stderr))
    except (OSError, SupervisorStartError) as error:
        return Answer(None, f"could not be started ({error})")
    return answer(done.returncode, _text(done.stdout), _text(done.stderr))


def answer(code: int, stdout: str, stderr: str) -> Answer:
    """What a process said that ended with this exit code (negative: a signal).  Its answer is its last line,
    because native code prints, too."""
    if code < 0:
        return Answer(None, f"was killed by {_signal_name(-code)}", stderr)
    if code:
        return Answer(None, f"ended with exit code {code}", stderr)
    try:
        said = json.loads(stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return Answer(None, "gave no answer", stderr)
    return Answer(said, "", stderr)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _environ(environ: Mapping[str, str], timeout: float) -> dict[str, str]:
    return {
        **environ,
        "ORT_DISABLE_TELEMETRY": "1",
        # What waits in there gives up before it is given up.
        "ONNX_DL_LOAD_TIMEOUT": f"{timeout * 0.8:.3f}",
        "ONNX_DL_START_TIMEOUT": f"{timeout * 0.8:.3f}",
    }


def _text(output: bytes | None) -> str:
    return (output or b"").decode(errors="replace")


# --- in the process ----------------------------------------------------------------------------------------


def installed() -> dict[str, Any]:
    """The onnxruntime that is imported: its version, the build whose files these are, its providers."""
    import onnxruntime
    from onnxruntime.capi import build_and_package_info as built

    return {
        "version": onnxruntime.__version__,
        "build": getattr(built, "package_name", None),
        "folder": str(Path(onnxruntime.__file__).parent),
        "providers": onnxruntime.get_available_providers(),
    }


def provider(name: str) -> dict[str, Any]:
    """A session of one node with one provider: which ones it really got, and whether it computes."""
    import numpy as np
    import onnxruntime

    if name in _CUDA and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # as a worker does
    session = onnxruntime.InferenceSession(onnx_builder.one_node("Abs"), providers=[name])
    (result,) = session.run(None, {"x0": np.array([-2], np.float32)})
    return {"providers": session.get_providers(), "computes": result.tolist() == [2.0]}


def start() -> dict[str, Any]:
    """A host with one model: where its worker came from, and how long all that took, in seconds."""
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
    """The processes that a process has spawned or taken in."""
    found = set()
    for status in proc.glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # it has just ended
            if f"\nPPid:\t{pid}\n" in status.read_text(errors="replace"):
                found.add(int(status.parent.name))
    return found


_TRIALS: Final[dict[str, Callable[..., dict[str, Any]]]] = {
    "installed": installed,
    "provider": provider,
    "start": start,
}


def main(trial: str, *arguments: str) -> None:
    """Entry point of the process."""
    said = _TRIALS[trial](*arguments)
    print(f"\n{json.dumps(said)}", flush=True)
