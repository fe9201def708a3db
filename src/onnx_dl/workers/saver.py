"""Saver process: saves one model for the load cache, in the background.

The supervisor starts it after a slow load, with idle CPU priority; it ends with the supervisor.  onnxruntime
writes the optimized form, runs the model, and runs the saved form, which is kept only if both give the same
bytes for the same inputs.  Each step is a process of its own, so that all need the memory of the largest
only.  The external form is written and compared without onnxruntime.  So a saver never uses a GPU.
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
from typing import TYPE_CHECKING, Final

import msgspec

from onnx_dl.core import digests, model_files
from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import TensorSpec
from onnx_dl.core.text import file_name
from onnx_dl.core.wire import NotAMessage
from onnx_dl.ort import recorder
from onnx_dl.system import process_setup
from onnx_dl.system.process_setup import die_with_parent
from onnx_dl.system.process_title import set_title
from onnx_dl.tensors import segment
from onnx_dl.workers.load_cache import external_form, rules
from onnx_dl.workers.load_cache.rules import SavedForm, SaveOrder
from onnx_dl.workers.load_cache.store import MODEL, WEIGHTS, EntryMeta, files_of, open_cache

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime
    from numpy.typing import NDArray

    from onnx_dl.workers.engines.ort_session import LoadedSession

    _Feed = dict[str, NDArray[np.generic]]

_SIZES: Final = (1, 2, 16, 64, 224)
"""Sizes tried in turn for dynamic dimensions."""
_GROWTH: Final = 4
"""Largest ratio of saved form to model: the weights twice, plain and packed.  More are folded constants."""
_TIMEOUT: Final = 600.0
"""Seconds for each of the three steps; there may be little idle CPU time."""
_INTERVAL: Final = 0.005
"""Seconds between two looks at the memory of a step."""
_SAME: Final = b"same"
"""Result of a step that wrote the external form of a model."""
_OOM_SCORE: Final = 1000
"""The maximum: the kernel kills a saver before any other process."""


class _TooLarge(Exception):
    """Error: a step took more memory than allowed."""


class RunDigests(msgspec.Struct, frozen=True):
    """Digests of the results of two runs with the same inputs.  ``size``: the accepted one of the sizes."""

    size: int
    first: str
    second: str


def main(order: int, blob: int, supervisor: int, memory: int) -> None:
    """Entry point of the process.

    Args:
        order: descriptor of the :class:`SaveOrder`, as JSON.
        blob: descriptor of a model given as bytes, or -1.
        supervisor: process id of the parent.
        memory: bytes that this may take.
    """
    process_setup.set_up_process()
    die_with_parent(supervisor)
    recorder.remove()
    set_title("saver")
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    process_setup.raise_oom_score(_OOM_SCORE)
    status = 0
    # No process waits for the result, and a cache that cannot be written is not an error.
    with contextlib.suppress(Exception), open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
        try:
            _save(msgspec.json.decode(segment.thaw(order), type=SaveOrder), blob, memory)
        except _TooLarge:
            status = os.EX_TEMPFAIL
    os._exit(status)


def _save(order: SaveOrder, blob: int, memory: int) -> None:
    spec = order.spec
    set_title(f"saver {file_name(spec.name)}")
    os.chdir(spec.cwd)
    read = order.description.files
    if model_files.changed(spec.where, read) is not None:  # since the load: the next one is of another model
        return
    names = [*([] if spec.blob is None else [""]), *(file.name for file in read)]

    def where(name: str) -> str | int:
        return spec.where(name) if name or spec.blob is None else blob

    stamps = digests.check(spec.sha256, names, where)  # or raises: such a model is not saved
    store = open_cache()
    found = store.find(order.key)
    if memory > _free_memory() or (found is not None and found.meta.description.files == read):
        return
    with store.writing(order.key) as path:
        if path is None:
            return
        if not _write_and_check(order, blob, path, memory):
            store.refuse(order.key)
            return
        unchanged = model_files.changed(spec.where, read) is None
        unchanged = unchanged and stamps == digests.stamps(spec.sha256, names, where)
        if unchanged and rules.key_of(spec, order.onnxruntime) == order.key:
            meta = EntryMeta(
                key=order.key,
                name=spec.name,
                source="" if spec.path is None else os.path.abspath(spec.path),
                description=order.description,
                files=files_of(path),
            )
            store.keep(order.key, path, meta)


def _write_and_check(order: SaveOrder, blob: int, path: Path, memory: int) -> bool:
    """Writes the saved form; returns whether it is right and not too large."""
    spec = order.spec
    if rules.form_of(spec) is SavedForm.EXTERNAL:
        source = blob if spec.path is None else os.open(spec.path, os.O_RDONLY)
        return _run_step(lambda: _write_external(source, path), memory) == _SAME
    if spec.path is None:  # read through a path: as bytes it would take its size once more
        spec = msgspec.structs.replace(spec, path=segment.path_of(blob), blob=None)
    saving = rules.saving(spec, str(path / MODEL), WEIGHTS)
    _run_step(lambda: b"written" if _load(saving) else b"", memory)
    if sum(file.stat().st_size for file in path.iterdir()) > _GROWTH * order.nbytes:
        return False
    plain = _digests(spec, _SIZES, memory)
    if plain is None:
        return False
    saved = _digests(rules.loading(spec, str(path / MODEL)), (plain.size,), memory)
    return saved is not None and plain.first == plain.second == saved.first  # some models are random


def _write_external(source: int, path: Path) -> bytes:
    model, weights = str(path / MODEL), str(path / WEIGHTS)
    try:
        moved = external_form.write(source, model, weights)
        is_right = moved >= SavedForm.EXTERNAL.value and external_form.is_same(source, model, weights)
    except NotAMessage:  # of more fields than are read, for example
        is_right = False
    return _SAME if is_right else b"other"


def _free_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 0


def _run_step(step: Callable[[], bytes], memory: int) -> bytes:
    """Runs a step in a process of its own and returns its result; raises _TooLarge, or OSError."""
    read_end, write_end = os.pipe()
    parent, pid = os.getpid(), os.fork()
    if pid == 0:
        with contextlib.suppress(Exception):
            die_with_parent(parent)
            os.write(write_end, step())
        os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        is_large = _watch(pid, read_end, memory)
        result = pipe.read()
    os.waitpid(pid, 0)
    if is_large:
        raise _TooLarge
    if not result:
        raise OSError("A step of a save failed.")
    return result


def _watch(pid: int, pipe: int, memory: int) -> bool:
    """Waits until a process writes or ends; kills it after too long, or if it takes too much memory: true."""
    deadline = time.monotonic() + _TIMEOUT
    while not select.select([pipe], [], [], _INTERVAL)[0]:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        is_large = pages * os.sysconf("SC_PAGESIZE") > memory
        if is_large or time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            return is_large
    return False


def _load(spec: ModelSpec) -> LoadedSession:
    # In the step only: onnxruntime's threads forbid fork.
    from onnx_dl.workers.engines import ort_session

    return ort_session.LoadedSession(spec, None)


def _digests(spec: ModelSpec, sizes: tuple[int, ...], memory: int) -> RunDigests | None:
    """Runs the model in a process of its own; None: it takes no input of these sizes."""
    result = _run_step(lambda: msgspec.json.encode(_run_twice(_load(spec).session, sizes)), memory)
    return msgspec.json.decode(result, type=RunDigests | None)


def _run_twice(session: onnxruntime.InferenceSession, sizes: tuple[int, ...]) -> RunDigests | None:
    for size in sizes:
        if (feed := _feed(session, size)) is not None:
            return RunDigests(size, _digest(session, feed), _digest(session, feed))
    return None


def _feed(session: onnxruntime.InferenceSession, size: int) -> _Feed | None:
    """Returns random inputs with this size in dynamic dimensions; None if the model does not take them."""
    import numpy as np

    random = np.random.default_rng(size)
    try:
        feed = {node.name: _value(node, size, random) for node in session.get_inputs()}
        session.run(None, feed)
    except Exception:  # another size, or a model whose inputs are not just any numbers
        return None
    return feed


def _value(node: TensorSpec, size: int, random: np.random.Generator) -> NDArray[np.generic]:
    import numpy as np

    shape = [length if isinstance(length, int) else size for length in node.shape]
    kind = node.type.removeprefix("tensor(").removesuffix(")")
    if kind in ("float", "double", "float16"):
        return random.standard_normal(shape).astype({"float": "f4", "double": "f8", "float16": "f2"}[kind])
    if kind == "string":
        return np.full(shape, "a", object)
    return random.integers(0, 2, shape).astype(kind)


def _digest(session: onnxruntime.InferenceSession, feed: _Feed) -> str:
    """Returns a digest of the bytes of all results."""
    import numpy as np

    digest = hashlib.sha256()
    for value in session.run(None, feed):
        data = value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()
        digest.update(b"%d " % len(data))
        digest.update(data)
    return digest.hexdigest()
