"""Programs that tests run as processes of their own, with a model that returns what it is given."""

from __future__ import annotations

import subprocess
import sys
from typing import Final

HEAD: Final = """
import gc, os, sys, signal, threading, warnings
warnings.simplefilter("ignore")  # Python 3.12 warns of fork beside threads
import numpy as np
from onnx_dl import InferenceSessionProxy, default_host
from tests.support.slow import identity_model
proxy = InferenceSessionProxy(identity_model(), providers=["CPUExecutionProvider"])
x = np.arange(1 << 18, dtype=np.float32)  # 1 MB: results of it lie in shared memory
run = lambda x: proxy.run(None, {"x": x})[0]
"""


def program(code: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs it behind :data:`HEAD`; it must end by itself, well, and without a word on stderr.

    ``environment``: instead of this process's.
    """
    command = [sys.executable, "-c", HEAD + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr + done.stdout
    return done
