"""Worker processes that never came to be."""

from __future__ import annotations

import gc
import os

from onnx_dl.supervisor.process import _Process


def test_a_worker_that_no_template_was_there_for_leaves_no_descriptor() -> None:
    gc.collect()
    before = sorted(os.listdir("/proc/self/fd"))
    blob = os.memfd_create("blob")
    for number in range(3):
        assert _Process(number, {"blob": blob}).buried() == ""
    os.close(blob)
    gc.collect()
    assert sorted(os.listdir("/proc/self/fd")) == before
