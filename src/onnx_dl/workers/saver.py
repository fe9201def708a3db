"""The process that saves a model for the load cache, in the background.

Started by a worker after a slow load, on idle processor time, and gone when the supervisor is.  It has
onnxruntime write the model, loads what was written, and keeps it only if both give the same bytes for the
same inputs.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import threading
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from onnx_dl import config
from onnx_dl.external import external_files
from onnx_dl.model import ModelDescription, ModelSpec, TensorSpec, file_identity
from onnx_dl.transport import shm
from onnx_dl.workers import cache, cacheable

_BOOT: Final = (
    "import os, sys; os.fork() and os._exit(0); "  # an orphan is the supervisor's, which outlives the worker
    "import json; sys.path[:] = json.loads(sys.argv[1]); "
    "from onnx_dl.workers.saver import main; main(sys.argv[2])"
)
_SIZES: Final = (1, 2, 16, 64, 224)
"""Tried in turn for dimensions that a model leaves open."""
_GROWTH: Final = 4
"""A saved form holds the weights twice, as they are and packed.  More: constants were computed beforehand."""
_NEEDED: Final = 4
"""Memory that saving takes, in sizes of the model."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What to save."""

    key: str
    onnxruntime: str
    spec: ModelSpec
    description: ModelDescription
    blob: int | None
    """Descriptor of a model given as bytes."""
    watch: int
    """Pidfd of a process that lives as long as the supervisor does."""


def start(order: Order) -> None:
    """Starts the process, and returns at once."""
    argv = [sys.executable, "-P", "-c", _BOOT, json.dumps(sys.path), msgspec.json.encode(order).decode()]
    for fd in (order.watch, order.blob):
        if fd is not None:
            os.set_inheritable(fd, True)
    pid = os.posix_spawn(sys.executable, argv, os.environ)
    # It forks and ends at once, so that what it forked is no child of this process, which may end before.
    threading.Thread(target=os.waitpid, args=(pid, 0), daemon=True).start()


def main(text: str) -> None:
    """Entry point of the process."""
    order = msgspec.json.decode(text, type=Order)
    _keep_out_of_the_way()
    threading.Thread(target=_leave_with, args=(order.watch,), daemon=True).start()
    # Nobody waits for this, and a cache that cannot be written is none.
    with contextlib.suppress(Exception), open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
        _save(order)
    os._exit(0)


def _keep_out_of_the_way() -> None:
    """Runs when nobody else wants to, and is the first to go when memory is short."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _leave_with(process: int) -> None:
    poll = select.poll()
    poll.register(process, select.POLLIN)
    poll.poll()
    os._exit(0)


def _save(order: Order) -> None:
    spec = order.spec
    os.chdir(spec.cwd)
    external = external_files(spec.path) if spec.path is not None else []
    before = [file_identity(path) for path in external]
    data = None if order.blob is None else shm.thaw(order.blob)
    nbytes = sum(size for *_, size, _ in before) + (
        os.path.getsize(spec.path) if spec.path else len(data or b"")
    )
    store = cache.Cache(cache.folder(), config.parse_size(config.settings().cache_limit))
    if _NEEDED * nbytes > _free_memory():
        return
    with store.writing(order.key) as path:
        if path is None:
            return
        if nbytes < cacheable.SMALLEST or not _try(spec, data, path, nbytes):
            store.refuse(order.key)
            return
        unchanged = [file_identity(file) for file in external] == before
        if unchanged and cacheable.key_of(spec, order.onnxruntime) == order.key:
            meta = cache.Meta(
                name=spec.name,
                source="" if spec.path is None else os.path.abspath(spec.path),
                description=order.description,
                files=cache.files_of(path),
                external=before,
            )
            store.keep(order.key, path, meta)


def _try(spec: ModelSpec, data: bytes | None, path: Path, nbytes: int) -> bool:
    """Writes the saved form; whether it is worth having."""
    _write(spec, data, path)
    written = sum(file.stat().st_size for file in path.iterdir())
    return written <= _GROWTH * nbytes and _gives_the_same(spec, data, path)


def _free_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 0


def _write(spec: ModelSpec, data: bytes | None, path: Path) -> None:
    from onnx_dl.workers.ort_session import Opened

    Opened(cacheable.saving(spec, str(path / cache.MODEL), cache.WEIGHTS), data)


def _gives_the_same(spec: ModelSpec, data: bytes | None, path: Path) -> bool:
    """Whether the saved model answers like the model itself, twice, because some give the dice a roll."""
    from onnx_dl.workers.ort_session import Opened

    session = Opened(spec, data).session
    feed = next((feed for size in _SIZES if (feed := _feed(session, size)) is not None), None)
    if feed is None:
        return False
    wanted, again = _bytes_of(session, feed), _bytes_of(session, feed)
    del session
    saved = Opened(cacheable.loading(spec, str(path / cache.MODEL)), None).session
    return wanted == again == _bytes_of(saved, feed)


def _feed(session: Any, size: int) -> dict[str, Any] | None:
    """An input that the model takes, if it takes one of this size."""
    random = np.random.default_rng(size)
    try:
        feed = {node.name: _value(node, size, random) for node in session.get_inputs()}
        session.run(None, feed)
    except Exception:  # another size, or a model whose inputs are not just any numbers
        return None
    return feed


def _value(node: TensorSpec, size: int, random: np.random.Generator) -> Any:
    shape = [length if isinstance(length, int) else size for length in node.shape]
    kind = node.type.removeprefix("tensor(").removesuffix(")")
    if kind in ("float", "double", "float16"):
        return random.standard_normal(shape).astype({"float": "f4", "double": "f8", "float16": "f2"}[kind])
    if kind == "string":
        return np.full(shape, "a", object)
    return random.integers(0, 2, shape).astype(kind)


def _bytes_of(session: Any, feed: dict[str, Any]) -> list[bytes]:
    results = session.run(None, feed)
    return [value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode() for value in results]
