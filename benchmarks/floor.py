"""The least that a process boundary can cost in Python: a bare pipe, one array in shared memory, one child.

No arena, no leases, no errors, no lifecycle: what is here in addition to in-process is two wake-ups and one
copy of the input.  With ``spin`` both ends burn a core instead of sleeping.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import tempfile

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np

_PAGE = 4096


class BarePipe:
    """``run`` takes one array and returns a view of the result, which the next call overwrites."""

    def __init__(
        self, model: bytes, threads: int, like: np.ndarray, result: np.ndarray, *, spin: bool
    ) -> None:
        self._file = tempfile.NamedTemporaryFile(suffix=".onnx")  # noqa: SIM115  # closed by close()
        self._file.write(model)
        self._file.flush()
        size = _PAGE + -(-like.nbytes // _PAGE) * _PAGE + result.nbytes
        memory = os.memfd_create("floor")
        os.ftruncate(memory, size)
        to_child, self._write = os.pipe()
        self._read, from_child = os.pipe()
        shapes = [repr((array.dtype.str, array.shape)) for array in (like, result)]
        self._child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.floor", self._file.name, str(threads), str(int(spin))]
            + [str(number) for number in (memory, size, to_child, from_child)]
            + shapes,
            pass_fds=[memory, to_child, from_child],
        )
        self._words, self._input, self._output = _views(memory, size, like, result)
        for fd in (memory, to_child, from_child):
            os.close(fd)
        self._spin = spin
        os.read(self._read, 1)

    def run(self, array: np.ndarray) -> np.ndarray:
        self._input[...] = array
        if self._spin:
            self._words[0] = 1
            while self._words[0]:
                pass
        else:
            os.write(self._write, b"1")
            os.read(self._read, 1)
        return self._output

    def close(self) -> None:
        os.close(self._write)
        self._child.kill()
        self._child.wait()
        os.close(self._read)
        self._file.close()


def _views(
    memory: int, size: int, like: np.ndarray, result: np.ndarray
) -> tuple[memoryview, np.ndarray, np.ndarray]:
    mapped = mmap.mmap(memory, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    after = _PAGE + -(-like.nbytes // _PAGE) * _PAGE
    return (
        memoryview(mapped)[:8].cast("Q"),
        np.ndarray(like.shape, like.dtype, mapped, _PAGE),
        np.ndarray(result.shape, result.dtype, mapped, after),
    )


def _serve(
    path: str, threads: str, spin: str, memory: str, size: str, read: str, write: str, *shapes: str
) -> None:
    import ast

    import onnxruntime

    arrays = [np.empty(shape, dtype) for dtype, shape in map(ast.literal_eval, shapes)]
    words, given, result = _views(int(memory), int(size), *arrays)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(threads)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for bind, node, array in (
        (binding.bind_input, session.get_inputs()[0], given),
        (binding.bind_output, session.get_outputs()[0], result),
    ):
        bind(node.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    os.write(int(write), b"1")
    while spin == "1":
        while not words[0]:
            pass
        session.run_with_iobinding(binding)
        words[0] = 0
    while os.read(int(read), 1):
        session.run_with_iobinding(binding)
        os.write(int(write), b"1")


if __name__ == "__main__":
    _serve(*sys.argv[1:])
