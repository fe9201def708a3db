"""Whatever stands in a file or comes from another process: a value, or the error that is documented.

``python -m tests.fuzz`` does more of it; tests/transport/test_hostile_peers.py attacks the sockets of a host.
"""

from __future__ import annotations

import ast
import contextlib
import os
import random
import time
import types
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from onnx_dl.errors import ProtocolError, RemoteError, SharedMemoryError
from onnx_dl.ort import ortvalues
from onnx_dl.protocol import control, failures
from onnx_dl.tensors import segment
from onnx_dl.tensors.block import HEADER, Block
from onnx_dl.transport.worker_lane import WorkerLane
from tests.fuzz import decoders, run

SOURCES = sorted((Path(__file__).parents[3] / "src" / "onnx_dl").rglob("*.py"))
FRAMES = 12_000


@pytest.mark.slow
def test_damaged_frames_of_every_kind() -> None:
    run.feed(FRAMES, seed=12)


def test_every_decoder_takes_what_is_whole() -> None:
    """A fuzzer whose frames are all refused at the door finds nothing."""
    with contextlib.ExitStack() as stack:
        for target in decoders.all_of(random.Random(1), stack):
            # These need the descriptors, or are read at places and in shapes that differ.
            if not target.name.startswith(("handover", "packed", "text")):
                for data in target.mutator.corpus:
                    target.take(data)


# --- what was found ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [[1], [4, 4], [0], [-4, -4], [1 << 40], [3]])
@pytest.mark.parametrize("copy", [True, False])
def test_bytes_that_are_no_tensor_of_the_shape_are_not_copied_beyond_it(shape: list[int], copy: bool) -> None:
    raw = np.zeros(1024, np.uint8)
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        ortvalues.put_together("dense", [1, shape, raw], copy=copy)


def test_bytes_are_no_text() -> None:
    with pytest.raises(ValueError):
        ortvalues.put_together("dense", [8, [4], np.zeros(128, np.uint8)], copy=True)


@pytest.mark.parametrize("cause", [1, {}, {"family": "builtin"}, [], {"family": 1, "name": "x", "args": []}])
def test_a_reason_that_is_no_failure(cause: object) -> None:
    failure = failures.Failure(family="builtin", name="ValueError", args=["no"], details={"cause": cause})
    error = failures.rebuild(failure)
    assert isinstance(error, ValueError) and isinstance(error.__cause__, RemoteError)


def test_arguments_that_no_exception_takes() -> None:
    failure = failures.Failure(
        family="builtin", name="UnicodeEncodeError", args=["utf-8", "x", 2**63, 1, "no"]
    )
    assert isinstance(failures.rebuild(failure), RemoteError)


def _loose(size: int) -> int:
    fd = os.memfd_create("loose")
    os.posix_fallocate(fd, 0, size)
    return fd


def _huge() -> int:
    fd = os.memfd_create("huge")
    os.truncate(fd, 1 << 42)
    return fd


@pytest.mark.parametrize(
    ("make", "size"),
    [(lambda: _loose(HEADER + 4096), 4096), (_huge, 1 << 41), (lambda: os.open(__file__, os.O_RDWR), 64)],
    ids=["one that may shrink", "one that nothing was taken for", "a file"],
)
def test_memory_that_could_end_who_maps_it(make, size: int) -> None:
    with pytest.raises(SharedMemoryError):
        Block(1, size, make())


def test_memory_of_ours_cannot_shrink() -> None:
    fd = segment.create(8192)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 64)
    os.close(fd)
    empty = segment.freeze(b"")
    assert segment.thaw(empty) == b""
    os.close(empty)


@pytest.mark.parametrize("field", ["ttl", "file_bytes"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -7, -(2**63)])
def test_numbers_that_no_time_or_size_can_be(field: str, number: float) -> None:
    message = {
        "type": "Acquire",
        "ticket": 1,
        "proxy": 1,
        "spec": {"key": "k", "name": "n", "cwd": "/"},
        "ttl": 1.0,
    }
    with pytest.raises(ProtocolError):
        control.from_client(msgspec.msgpack.encode(message | {field: number}))


def test_a_use_in_the_future_is_now() -> None:
    """The word is the peer's; a number beyond 64 bits, after rounding, ended the worker."""
    mappings = types.SimpleNamespace(clock=lambda: 2**64 - 1)
    lane: Any = types.SimpleNamespace(mappings=mappings)
    assert WorkerLane.last_touch(lane) <= time.monotonic()


# --- nothing that came is run -------------------------------------------------------------------------------

RUNNERS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "code", "codeop", "runpy"}
CALLS = {"eval", "exec", "compile", "__import__"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    """A proxy may be pickled, by others: it says how it is made again, and unpickles nothing."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names} & RUNNERS
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").split(".")[0]} & RUNNERS
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found |= {node.func.id} & CALLS
        elif (
            isinstance(node, ast.keyword)
            and node.arg == "allow_pickle"
            and ast.unparse(node.value) != "False"
        ):
            found.add(node.arg)  # numpy does not without it
    assert not found
