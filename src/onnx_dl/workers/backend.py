"""The seam between a worker and the engine that runs its model.

Covers what a worker asks of an engine.  An engine is one file beside this one; it is imported in the worker
only, and knows nothing of sockets, shared memory or policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from onnx_dl.model import ModelDescription, ModelSpec


class Backend(Protocol):
    """One loaded model.  Its methods are called from many threads at once."""

    def describe(self) -> ModelDescription:
        """What the model says of itself."""

    def ready(self, seconds: float, blob: int | None) -> None:
        """The model was loaded within so many seconds and its callers know: time for what can be done in the
        background.  ``blob``: descriptor of a model given as bytes, valid until this returns."""

    def run(self, outputs: Any, feed: dict[str, Any], options: dict[str, Any] | None) -> Sequence[Any]:
        """One inference.  Arrays in ``feed`` are valid only until this returns, and results must not
        share memory with them."""

    def repeat(
        self, outputs: Any, feed: dict[str, Any], results: list[NDArray[Any]]
    ) -> Callable[[], object] | None:
        """A call that was made before, as a function that can be called again and again: it reads ``feed``
        and writes ``results`` in place, and raises if they cannot hold what comes out.  None if the engine
        cannot do that."""

    def invoke(self, method: str, args: list[Any]) -> Any:
        """Another method of the engine's session.

        Raises:
            AttributeError: there is no such method.
        """

    def close(self) -> None:
        """The last thing that is asked: write what must be on disk.  Memory need not be freed."""


def load(spec: ModelSpec, blob: bytes | None) -> Backend:
    """Loads the model.  Raises what the engine raises."""
    from onnx_dl.workers.ort import OnnxRuntimeBackend

    return OnnxRuntimeBackend(spec, blob)
