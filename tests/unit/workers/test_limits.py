"""The heap's free pages, and the pages of a parent; each in an interpreter of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from onnx_dl import linux_only
from onnx_dl.system import heap

HOLE = """
import ctypes, os
from onnx_dl.system import heap as memory

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
size, count = 100_000, 400
blocks = [libc.malloc(size) for _ in range(count)]
for block in blocks:
    ctypes.memset(block, 1, size)
for block in blocks[:-1]:
    libc.free(ctypes.c_void_p(block))
held = resident()
memory.trim_heap()
print(held - resident())
"""

CHILD = """
import gc, os
from onnx_dl.workers import limits as memory

kept = [[i] for i in range(300_000)]
memory.share_heap()
if os.fork() == 0:
    gc.collect()
    with open("/proc/self/smaps_rollup") as rollup:
        (dirty,) = [line.split()[1] for line in rollup if line.startswith("Private_Dirty")]
    print(int(dirty) * 1024, flush=True)
    os._exit(0)
os.wait()
"""


def answer(program: str) -> int:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_trim_gives_back_what_lies_below_a_block_in_use() -> None:
    assert answer(HOLE) > 30e6


def test_trim_is_nothing_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_trim", linux_only.libc_function("no_such_function", otherwise=id))
    heap.trim_heap()


def test_a_child_that_collects_garbage_copies_no_pages() -> None:
    assert answer(CHILD) < 10e6
