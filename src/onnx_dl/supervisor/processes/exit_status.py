"""Wait statuses of child processes as plain data."""

from __future__ import annotations

import contextlib
import os
import signal

from onnx_dl.supervisor.policy.exit_reasons import ExitStatus


def decode(wait_status: int) -> ExitStatus:
    """Decodes what ``waitpid`` returns."""
    code = os.waitstatus_to_exitcode(wait_status)
    if code >= 0:
        return ExitStatus(code)
    name = f"signal {-code}"
    with contextlib.suppress(ValueError):  # a real-time signal has no name
        name = signal.Signals(-code).name
    return ExitStatus(None, -code, name)
