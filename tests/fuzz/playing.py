"""Plays a fuzzer, or the soak, for half a minute.

By hand for an hour: ``python -m tests.fuzz.results --minutes 60 --seed 1``, and so on.  Each is a program of
its own, because it forks, kills what it started, and changes what holds for its whole process.
``FUZZ_MINUTES`` and ``FUZZ_SEED`` set how long each goes on, and what it draws.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SEED = os.environ.get("FUZZ_SEED", "1")
BEYOND = 150
"""Seconds for the start, the end and a last step on a machine that is busy."""


def play(module: str) -> str:
    """What it printed; fails where it found something, with what it printed."""
    minutes = float(os.environ.get("FUZZ_MINUTES", "0.4"))
    done = subprocess.run(
        [sys.executable, "-m", module, "--minutes", str(minutes), "--seed", SEED],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60 * minutes + BEYOND,
    )
    assert done.returncode == 0, done.stdout[-20_000:]
    return done.stdout
