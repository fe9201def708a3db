"""Interface between a worker and the engine that runs its model.

An engine is one module beside this one, named by ``ModelSpec.engine``, with a function
``open_model(spec, blobs)`` that returns a :class:`Backend`.  It is imported in the worker only, and knows
nothing of sockets or policy.  A backend that uses the load cache has a method ``origin()``, too, and its
``open_model`` takes ``mapped=True``: load the model from there, or raise :class:`NotInCache`.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Final, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from onnx_dl.core import digests, model_files
from onnx_dl.core.model_files import ReadFile
from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import ModelDescription
from onnx_dl.errors import EngineError, FilesChanging
from onnx_dl.workers.load_cache.rules import SaveOrder

Array = NDArray[np.generic]
Callback = Callable[[], object]
Feed = dict[str, object]
Options = dict[str, object] | None
"""RunOptions as plain data (:mod:`onnx_dl.ort.options`)."""
Results = Sequence[object]

_T = TypeVar("_T")
_ATTEMPTS: Final = 3
"""Loads of a model whose files change."""


class CancelToken:
    """Cancellation of one lane's present call, requested by its caller over another lane.

    The lane's thread attaches a function that ends the call; any thread may cancel.  A request has the call's
    number, so that one that comes after the end of the call cancels no other call.
    """

    __slots__ = ("_cancelled", "_end", "_lock", "number")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.number = 0
        """The number of the caller's request that is under way.  The lane's thread sets it."""
        self._cancelled = -1
        self._end: Callable[[], object] | None = None

    def attach(self, end: Callable[[], object] | None) -> None:
        """Sets the function that ends the present call, if any; calls it if that was cancelled before."""
        with self._lock:
            self._end = end
            if end is not None and self._cancelled == self.number:
                end()

    def detach(self) -> None:
        """Forgets that function: the call has ended."""
        with self._lock:
            self._end = None

    @property
    def is_cancelled(self) -> bool:
        """Tells whether the present call was cancelled."""
        return self._cancelled == self.number

    def cancel(self, number: int) -> None:
        """Ends the request of this number, now or as soon as it begins."""
        with self._lock:
            self._cancelled = number
            if self._end is not None and self.number == number:
                self._end()


class BoundRun(NamedTuple):
    """A call whose inputs and results have fixed places in memory.  ``run`` makes it; ``cancel`` ends it
    early and is called from another thread, None: it cannot be ended."""

    run: Callback
    cancel: Callback | None


class Rerun(NamedTuple):
    """A call made before, for other values of the same names and types.  ``run`` takes a feed and returns the
    results; ``cancel`` ends it early from another thread, after which it cannot be used again."""

    run: Callable[[Feed], Results]
    cancel: Callback


class NotInCache(RuntimeError):
    """Error: the load cache does not have the model in a usable form."""


class Origin(NamedTuple):
    """Source of a load."""

    entry: str = ""
    """Key of the model in the load cache, whether it is there or not; empty: it is never cached."""
    mapped: bool = False
    """True if it was loaded from there."""


class Backend(Protocol):
    """One loaded model.  Its methods are called from many threads at once."""

    def describe(self) -> ModelDescription:
        """Returns the model's metadata."""

    def ready(self, seconds: float, blobs: Mapping[str, int]) -> Sequence[SaveOrder]:
        """Is called once callers know that the model is loaded.

        Args:
            seconds: of the load, without warm-up.
            blobs: as given to ``open_model``.

        Returns:
            Models to save in the background, so that their next load is faster.
        """

    def run(self, outputs: object, feed: Feed, options: Options, token: CancelToken) -> Results:
        """Runs the model once.  Results must not share memory with ``feed``, which is valid until then."""

    def run_async(
        self, outputs: object, feed: Feed, options: Options, token: CancelToken, started: Callback
    ) -> Results:
        """Runs the model like the engine's own background runs; calls ``started`` once it runs.  Errors
        raised before that are the caller's; the text of later ones goes to its callback."""

    def bind(self, outputs: object, feed: Feed, results: Sequence[Array]) -> BoundRun | None:
        """Prepares a call that was made before to be repeated: it reads ``feed`` and writes ``results`` in
        place, and raises if the results do not fit.  Returns None if the engine cannot do that."""

    def rerun(self, outputs: object) -> Rerun | None:
        """Prepares a call for other feeds of the same names and types; None if :meth:`run` is as fast."""

    def invoke(self, method: str, args: list[object], token: CancelToken) -> object:
        """Calls another method of the engine's session.

        Raises:
            AttributeError: there is no such method.
        """

    def close(self) -> None:
        """Writes what must be on disk, as the last call.  Memory need not be freed."""


def member(backend: Backend, key: str) -> Backend:
    """Returns the member of a group that a caller names, or the only model."""
    members: Mapping[str, Backend] | None = getattr(backend, "members", None)
    return backend if members is None else members[key]


def enter(folder: str) -> None:
    """Changes to the folder of a model's relative paths, or to / if it was removed: it may have none."""
    try:
        os.chdir(folder)
    except FileNotFoundError:
        os.chdir("/")


def load(spec: ModelSpec, blobs: Mapping[str, int], *, mapped: bool = False) -> Backend:
    """Loads the model.

    Args:
        blobs: descriptors of memory by name, with those that the spec names.
        mapped: load from the load cache only.

    Raises:
        NotInCache: the load cache does not have it.
        EngineError: memory that it names is not there.
        ValueError: there is no such engine.
        Exception: the engine's.
    """
    engine = None
    if spec.engine.isidentifier():
        name = f"onnx_dl.workers.engines.{spec.engine}"
        try:
            engine = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:  # the engine exists, and a module that it needs is missing
                raise
    opens = getattr(engine, "open_model", None)
    if opens is None:
        raise ValueError(f"There is no engine {spec.engine!r}.")
    if not spec.members:  # a group gives each member its own
        if not blobs.keys() >= set(spec.blobs):
            raise EngineError(
                f"{spec.name} cannot be loaded: the application that gave its bytes or initializers is gone "
                "or has closed it, or its group has more than 125 of these. Open it again, or from a file."
            )
        blobs = {name: blobs[name] for name in spec.blobs}
    backend: Backend = opens(spec, blobs, mapped=True) if mapped else opens(spec, blobs)
    return backend


def origin(backend: Backend) -> Origin:
    """Returns the source of the model's load."""
    find: Callable[[], Origin] = getattr(backend, "origin", Origin)
    return find()


def bind_devices(backend: Backend, inputs: Sequence[object], outputs: Sequence[object]) -> BoundRun:
    """Returns a run that is bound to tensors on devices: pairs of a name and a tensor.

    Raises:
        EngineError: the engine has no such runs.
        Exception: the engine's.
    """
    bind: Callable[..., BoundRun] | None = getattr(backend, "bind_devices", None)
    if bind is None:
        raise EngineError("This engine takes no memory on a device.")
    return bind(inputs, outputs)


class DeviceResults(list[object]):
    """Results of which some stay on a device: tensors, whose owners have the memory."""


def captures_graphs(backend: Backend) -> bool:
    """Tells whether later runs may use memory of an earlier one, because the engine has captured a graph."""
    return bool(getattr(backend, "captures_graphs", False))


def turn(backend: Backend) -> AbstractContextManager[object] | None:
    """Returns the lock that runs of this process take because one of its models captures graphs; None: they
    need none."""
    members: Mapping[str, Backend] = getattr(backend, "members", {})
    found = (getattr(each, "turn", None) for each in (backend, *members.values()))
    return next(filter(None, found), None)


def trim(backend: Backend) -> None:
    """Has the engine return memory that no run uses to the system, if it can.  Runs may go on meanwhile."""
    give_back: Callable[[], object] = getattr(backend, "trim", tuple)
    give_back()


def cuda_device(backend: Backend) -> int | None:
    """Returns the number of the GPU that the engine uses by CUDA, in this process; None: it uses none."""
    number: int | None = getattr(backend, "cuda_device", None)
    return number


def places(spec: ModelSpec, blob: int | None) -> Callable[[str], str | int]:
    """Returns a function from the names of a model's files to their paths.  ``blob``: the descriptor of a
    model given as bytes, whose name is empty."""
    return lambda name: spec.where(name) if name or blob is None else blob


def load_unchanged(
    spec: ModelSpec, names: Callable[[], list[str]], make: Callable[[], _T], blob: int | None = None
) -> tuple[_T, list[ReadFile]]:
    """Returns the result of ``make``, and the files that it was made of, so that these describe it.

    The files may be replaced meanwhile: each is looked at before and after.  If one has changed, the result
    may be a mixture of old and new files, and is made once more.

    Args:
        names: returns the names of all files that ``make`` reads; called before each attempt.
        blob: descriptor of a model given as bytes.

    Raises:
        ModelDigestMismatch: a file is not the one that ``sha256`` says.
        FilesChanging: they changed at each attempt.
        Exception: what ``make`` raised.
    """
    where = places(spec, blob)
    for _ in range(_ATTEMPTS):
        found = names()
        read = model_files.identities(spec.where, found)
        checked = found if blob is None else ["", *found]
        try:
            stamps = digests.check(spec.sha256, checked, where)
            made = make()
        except Exception:  # perhaps because it read old and new files
            if (path := model_files.changed(spec.where, read)) is None:
                raise
        else:
            path = model_files.changed(spec.where, read)
            if path is None and stamps == digests.stamps(spec.sha256, checked, where):
                return made, read
            path = path or spec.where("")
            del made
    raise FilesChanging(
        f"{path} was changed while {spec.name} was loaded, {_ATTEMPTS} times in a row. Load it after "
        "it is written, or write it under another name and then rename it."
    )
