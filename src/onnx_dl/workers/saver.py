"""The process that saves a model for the load cache, in the background.

Started by the supervisor after a slow load, on idle processor time, and gone when the supervisor is.
onnxruntime writes the model, runs the model itself, and runs what was written: one after another, each in a
process of its own, so that all takes no more memory than the largest of the three.  What was written is kept
only if both gave the same bytes for the same inputs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from onnx_dl.core import file_identity, parsing, settings
from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import ModelDescription, TensorSpec
from onnx_dl.ort import recorder
from onnx_dl.system import process_setup
from onnx_dl.system.prctl import die_with_parent
from onnx_dl.tensors import segment
from onnx_dl.workers.load_cache import rules
from onnx_dl.workers.load_cache.store import MODEL, WEIGHTS, Cache, Meta, files_of, folder

if TYPE_CHECKING:
    from onnx_dl.workers.engines.ort_session import Opened

_SIZES: Final = (1, 2, 16, 64, 224)
"""Tried in turn for dimensions that a model leaves open."""
_GROWTH: Final = 4
"""A saved form holds the weights twice, as they are and packed.  More: constants were computed beforehand."""
_PATIENCE: Final = 600.0
"""Seconds for each of the three; there may be little idle time."""
_PAUSE: Final = 0.005
_OOM_SCORE: Final = 1000
"""The most there is: nobody waits for what is saved."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What to save."""

    key: str
    onnxruntime: str
    spec: ModelSpec
    description: ModelDescription
    nbytes: int
    """Of the model."""


class _TooLarge(Exception):
    """It took more memory than it may."""


class Answers(msgspec.Struct, frozen=True):
    """What a model gave, twice for the same inputs: digests.  ``size``: which of the sizes it took."""

    size: int
    first: str
    second: str


def main(order: int, blob: int, supervisor: int, memory: int) -> None:
    """Entry point of the process.

    Args:
        order: descriptor of the :class:`Order`, as JSON.
        blob: descriptor of a model given as bytes, or -1.
        supervisor: process id of the parent.
        memory: bytes that this may take.
    """
    process_setup.make_own()
    die_with_parent(supervisor)
    recorder.remove()
    _keep_out_of_the_way()
    status = 0
    # Nobody waits for this, and a cache that cannot be written is none.
    with contextlib.suppress(Exception), open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
        try:
            _save(msgspec.json.decode(segment.thaw(order), type=Order), blob, memory)
        except _TooLarge:
            status = os.EX_TEMPFAIL
    os._exit(status)


def _keep_out_of_the_way() -> None:
    """Runs when nobody else wants to, and is the first to go when memory is short."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    process_setup.go_first(_OOM_SCORE)


def _save(order: Order, blob: int, memory: int) -> None:
    spec = order.spec
    os.chdir(spec.cwd)
    read = order.description.files
    if (
        file_identity.changed(spec.where, read) is not None
    ):  # since the load: the next one will be of another model
        return
    store = Cache(folder(), parsing.parse_size(settings.settings().cache_limit))
    found = store.find(order.key)
    if memory > _free_memory() or (found is not None and found.meta.description.files == read):
        return
    with store.writing(order.key) as path:
        if path is None:
            return
        if not _try(order, blob, path, memory):
            store.refuse(order.key)
            return
        unchanged = file_identity.changed(spec.where, read) is None
        if unchanged and rules.key_of(spec, order.onnxruntime) == order.key:
            meta = Meta(
                key=order.key,
                name=spec.name,
                source="" if spec.path is None else os.path.abspath(spec.path),
                description=order.description,
                files=files_of(path),
            )
            store.keep(order.key, path, meta)


def _try(order: Order, blob: int, path: Path, memory: int) -> bool:
    """Writes the saved form; whether it is worth having."""
    spec = order.spec
    if spec.path is None:  # read like a file: as bytes it would take its size once more
        spec = msgspec.structs.replace(spec, path=segment.path_of(blob), blob=None)
    saving = rules.saving(spec, str(path / MODEL), WEIGHTS)
    _apart(lambda: b"written" if _opened(saving) else b"", memory)
    if sum(file.stat().st_size for file in path.iterdir()) > _GROWTH * order.nbytes:
        return False
    plain = _answers(spec, _SIZES, memory)
    if plain is None:
        return False
    saved = _answers(rules.loading(spec, str(path / MODEL)), (plain.size,), memory)
    return saved is not None and plain.first == plain.second == saved.first  # some give the dice a roll


def _free_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 0


# --- processes of their own ------------------------------------------------------------------------------


def _apart(step: Callable[[], bytes], memory: int) -> bytes:
    """What a step returns that runs in a process of its own.

    Raises:
        _TooLarge: it would have taken more than ``memory`` bytes.
        OSError: it did not end well, or not in time.
    """
    read_end, write_end = os.pipe()
    parent, pid = os.getpid(), os.fork()
    if pid == 0:
        _be_apart(step, write_end, parent)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        is_large = _watch(pid, read_end, memory)
        told = pipe.read()
    os.waitpid(pid, 0)
    if is_large:
        raise _TooLarge
    if not told:
        raise OSError("A step of a save failed.")
    return told


def _be_apart(step: Callable[[], bytes], pipe: int, parent: int) -> None:
    """The rest of this process's life."""
    with contextlib.suppress(Exception):
        die_with_parent(parent)
        os.write(pipe, step())
    os._exit(0)


def _watch(pid: int, pipe: int, memory: int) -> bool:
    """Until a process has something to say or has ended; it is ended if it takes too much or too long.
    Whether it took too much."""
    deadline = time.monotonic() + _PATIENCE
    while not select.select([pipe], [], [], _PAUSE)[0]:
        is_large = _resident(pid) > memory
        if is_large or time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            return is_large
    return False


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


# --- in these --------------------------------------------------------------------------------------------


def _opened(spec: ModelSpec) -> Opened:
    from onnx_dl.workers.engines.ort_session import (
        Opened,  # onnxruntime has threads, and those are not forked
    )

    return Opened(spec, None)


def _answers(spec: ModelSpec, sizes: tuple[int, ...], memory: int) -> Answers | None:
    """None: it takes no input of these sizes."""
    told = _apart(lambda: msgspec.json.encode(_ask(_opened(spec).session, sizes)), memory)
    return msgspec.json.decode(told, type=Answers | None)


def _ask(session: Any, sizes: tuple[int, ...]) -> Answers | None:
    for size in sizes:
        if (feed := _feed(session, size)) is not None:
            return Answers(size, _digest(session, feed), _digest(session, feed))
    return None


def _feed(session: Any, size: int) -> dict[str, Any] | None:
    """An input that the model takes, if it takes one of this size."""
    import numpy as np

    random = np.random.default_rng(size)
    try:
        feed = {node.name: _value(node, size, random) for node in session.get_inputs()}
        session.run(None, feed)
    except Exception:  # another size, or a model whose inputs are not just any numbers
        return None
    return feed


def _value(node: TensorSpec, size: int, random: Any) -> Any:
    import numpy as np

    shape = [length if isinstance(length, int) else size for length in node.shape]
    kind = node.type.removeprefix("tensor(").removesuffix(")")
    if kind in ("float", "double", "float16"):
        return random.standard_normal(shape).astype({"float": "f4", "double": "f8", "float16": "f2"}[kind])
    if kind == "string":
        return np.full(shape, "a", object)
    return random.integers(0, 2, shape).astype(kind)


def _digest(session: Any, feed: dict[str, Any]) -> str:
    """Of the bytes of all results."""
    import numpy as np

    digest = hashlib.sha256()
    for value in session.run(None, feed):
        data = value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()
        digest.update(b"%d " % len(data))
        digest.update(data)
    return digest.hexdigest()
