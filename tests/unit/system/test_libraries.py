"""Libraries that a process has loaded."""

from __future__ import annotations

import ctypes.util
import subprocess
import sys

from onnx_dl.linux_only import library_if_loaded
from tests.support.waiting import DEADLINE, allowed

_MANY_ASK = """
import sys, threading
from onnx_dl.linux_only import library_if_loaded
sys.setswitchinterval(1e-5)
def ask():
    for _ in range(5000):
        library_if_loaded("libcuda.so.1")
threads = [threading.Thread(target=ask) for _ in "ab"]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def test_a_library_that_is_loaded_and_one_that_is_not() -> None:
    name = ctypes.util.find_library("c")
    assert name is not None
    assert library_if_loaded(name) is not None
    assert library_if_loaded("libnobody-has-this.so.1") is None


def test_threads_that_ask_at_once_do_not_wait_for_each_other_for_ever() -> None:
    """The C library's lock and Python's: whoever holds one must not wait for the other."""
    subprocess.run([sys.executable, "-c", _MANY_ASK], check=True, timeout=allowed(3 * DEADLINE))
