"""The seam between a worker and the engine that runs its model.

Covers what a worker asks of an engine.  An engine is one module beside this one, named by
``ModelSpec.engine``, whose function ``open_model(spec, blobs)`` returns a :class:`Backend`.  It is imported
in the worker only, and knows nothing of sockets or policy.  One that uses the load cache has more
(:class:`Cached`).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from numpy.typing import NDArray

from onnx_dl.core.environment import Environment
from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import ModelDescription
from onnx_dl.errors import EngineError
from onnx_dl.workers.cancellation import Halt


class Repeatable(NamedTuple):
    """A prepared call: ``run`` makes it, ``halt`` has it end early, from another thread."""

    run: Callable[[], object]
    halt: Callable[[], object] | None


class Rerun(NamedTuple):
    """A call that was made before, for other values of the same types: ``run`` makes it with a feed and gives
    the results, ``halt`` has it end early, from another thread, and of no more use."""

    run: Callable[[dict[str, Any]], Sequence[Any]]
    halt: Callable[[], object]


class Save(NamedTuple):
    """A model that is worth saving for the load cache."""

    key: str
    nbytes: int
    """Of its files, or as it was given."""
    blob: str | None
    """The name of the memory that it was given as."""
    order: str
    """What :mod:`onnx_dl.workers.saver` is to be told."""
    environment: Environment
    """The variables that it is to have."""


class Unsaved(RuntimeError):
    """The load cache does not have the model, or in no form that can be used."""


class Origin(NamedTuple):
    """Where a model was loaded from."""

    entry: str = ""
    """Under which key the load cache has it, or would have it; empty: it never does."""
    mapped: bool = False
    """It came from there."""


class Backend(Protocol):
    """One loaded model.  Its methods are called from many threads at once."""

    def describe(self) -> ModelDescription:
        """What the model says of itself."""

    def ready(self, seconds: float, blobs: Mapping[str, int]) -> Sequence[Save]:
        """The model was loaded within so many seconds and its callers know.

        Args:
            seconds: of the load, without warm-up.
            blobs: as it was loaded with.

        Returns:
            What is worth saving in the background, so that the next load is faster.
        """

    def run(
        self, outputs: Any, feed: dict[str, Any], options: dict[str, Any] | None, halt: Halt
    ) -> Sequence[Any]:
        """One inference.  Arrays in ``feed`` are valid only until this returns, and results must not
        share memory with them."""

    def run_async(
        self,
        outputs: Any,
        feed: dict[str, Any],
        options: dict[str, Any] | None,
        halt: Halt,
        started: Callable[[], object],
    ) -> Sequence[Any]:
        """Like :meth:`run`, as the engine does it in the background; ``started`` is called once it runs.
        What is raised before is the caller's error, what is raised after is told to its callback as text."""

    def repeat(self, outputs: Any, feed: dict[str, Any], results: list[NDArray[Any]]) -> Repeatable | None:
        """A call that was made before, to be made again and again: it reads ``feed`` and writes ``results``
        in place, and raises if they cannot hold what comes out.  None if the engine cannot do that."""

    def rerun(self, outputs: Any) -> Rerun | None:
        """A call that was made before, to be made with other feeds of the same names and types; None if the
        engine has no faster way than :meth:`run`."""

    def invoke(self, method: str, args: list[Any], halt: Halt) -> Any:
        """Another method of the engine's session.

        Raises:
            AttributeError: there is no such method.
        """

    def close(self) -> None:
        """The last thing that is asked: write what must be on disk.  Memory need not be freed."""


@runtime_checkable
class Cached(Protocol):
    """What a backend has whose engine uses the load cache; ``open_model`` takes ``mapped=True`` then: the
    model is to come from there, or to raise :class:`Unsaved`."""

    def origin(self) -> Origin:
        """Where the model was loaded from."""


def member(backend: Backend, key: str) -> Backend:
    """The one of a group's that a caller names, or else the only one that there is."""
    members: Mapping[str, Backend] | None = getattr(backend, "members", None)
    return backend if members is None else members[key]


def enter(folder: str) -> None:
    """Goes where relative paths of a model begin; a model with none needs no folder that is still there."""
    try:
        os.chdir(folder)
    except FileNotFoundError:
        os.chdir("/")


def load(spec: ModelSpec, blobs: Mapping[str, int], *, mapped: bool = False) -> Backend:
    """Loads the model; ``blobs``: descriptors of memory by name, those that the spec names among them;
    ``mapped``: only from the load cache.

    Raises:
        Unsaved: it is not there.
        EngineError: some that it names are not.
        ValueError: there is no such engine.
        Exception: what the engine raises.
    """
    engine = None
    if spec.engine.isidentifier():
        name = f"onnx_dl.workers.engines.{spec.engine}"
        try:
            engine = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:  # there is one, and something that it needs is missing
                raise
    opens = getattr(engine, "open_model", None)
    if opens is None:
        raise ValueError(f"There is no engine {spec.engine!r}.")
    given = blobs if spec.members else _own(spec, blobs)
    backend: Backend = opens(spec, given, mapped=True) if mapped else opens(spec, given)
    return backend


def origin(backend: Backend) -> Origin:
    """Where a model was loaded from."""
    return backend.origin() if isinstance(backend, Cached) else Origin()


def _own(spec: ModelSpec, blobs: Mapping[str, int]) -> dict[str, int]:
    if not blobs.keys() >= set(spec.blobs):
        raise EngineError(
            f"{spec.name} cannot be loaded: the application that gave its bytes or initializers is gone or "
            "has closed it, or its group has more than 125 of such. Open it again, or from a file."
        )
    return {name: blobs[name] for name in spec.blobs}
