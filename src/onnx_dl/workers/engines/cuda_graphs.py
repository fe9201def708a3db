"""Runs of a session that captures CUDA graphs (``enable_cuda_graph``).

A graph has the addresses of the run that it was captured from.  Later runs of the same number (the run option
``gpu_graph_id``) replay it, whatever they are bound to.  So here each set of memory has a number of its own,
and calls by value, whose memory is another each time, have none: they run, but not as a graph.  And a session
that captures graphs must not run in two threads at once, so its runs take turns.

Knows nothing of onnxruntime: it wraps the engine's backend.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

from onnx_dl.tensors.device_values import DeviceTensor, Loan
from onnx_dl.workers.engines.base import BoundRun, Callback, CancelToken, Feed, Options, Results

TURN: Final = threading.RLock()
"""Held while a session that captures graphs runs.  One for the process: while a graph is captured, calls of
CUDA's driver in other threads could spoil it."""

OPTION: Final = "gpu_graph_id"
NO_GRAPH: Final = -1
"""Number of runs that are neither captured nor replayed."""
_MOST: Final = 16
"""Sets of memory with a graph.  Others run without."""

_Bound = Sequence[Sequence[object]]
"""Name and value of each input, or name and more of each output with its place at the end."""


class GraphNumbers:
    """The numbers of graphs, by the memory that they were captured with.  Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers: dict[tuple[object, ...], int] = {}
        self._last = 0

    def number(self, given: str | None, inputs: _Bound, outputs: _Bound) -> int:
        """Returns the number for a run.  ``given``: the caller's own, if it gave one.

        :data:`NO_GRAPH` if the caller says so, something lies elsewhere, or there are too many graphs.
        """
        bound = [(row[0], row[-1]) for row in (*inputs, *outputs)]
        if given == str(NO_GRAPH) or not all(isinstance(value, DeviceTensor) for _, value in bound):
            return NO_GRAPH
        memory = [(name, *_memory(value)) for name, value in bound if type(value) is DeviceTensor]
        key = given or "0", len(inputs), *memory
        with self._lock:
            if (known := self._numbers.get(key)) is not None:
                return known
            for old in [old for old in self._numbers if not _is_open(old)]:
                del self._numbers[old]  # never replayed again: its addresses are those of other memory now
            if len(self._numbers) >= _MOST:
                return NO_GRAPH
            self._last += 1
            self._numbers[key] = self._last
            return self._last

    def released(self, given: str) -> list[int]:
        """Forgets the graphs of a caller's number, and returns theirs."""
        with self._lock:
            found = {key: number for key, number in self._numbers.items() if key[0] == given}
            for key in found:
                del self._numbers[key]
        return list(found.values())


def _memory(tensor: DeviceTensor) -> tuple[object, ...]:
    """Tells memory apart, also if it came to the address of memory that is closed."""
    return *tensor.where, tensor.owner if isinstance(tensor.owner, Loan) else None


def _is_open(key: tuple[object, ...]) -> bool:
    owners = [row[-1] for row in key[2:] if isinstance(row, tuple)]
    return all(owner.is_open for owner in owners if isinstance(owner, Loan))


class GraphBackend:
    """A backend whose session captures graphs."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._numbers = GraphNumbers()
        self.turn = TURN
        """Held by runs.  Whoever else calls CUDA's driver in this process should hold it, too."""

    def __getattr__(self, name: str) -> Any:
        """The wrapped backend has the rest."""
        return getattr(self._backend, name)

    def run(self, outputs: object, feed: Feed, options: Options, token: CancelToken) -> Results:
        with TURN:
            result: Results = self._backend.run(outputs, feed, _numbered(options, NO_GRAPH), token)
        return result

    def run_async(
        self, outputs: object, feed: Feed, options: Options, token: CancelToken, started: Callback
    ) -> Results:
        with TURN:
            result: Results = self._backend.run_async(
                outputs, feed, _numbered(options, NO_GRAPH), token, started
            )
        return result

    def bind(self, *_: object) -> None:
        """Refuses calls by value, which :meth:`run` makes."""

    rerun = bind

    def bind_devices(
        self, inputs: Sequence[tuple[str, DeviceTensor]], outputs: Sequence[tuple[str, DeviceTensor]]
    ) -> BoundRun:
        number = self._numbers.number(None, inputs, outputs)
        with TURN:
            bound: BoundRun = self._backend.bind_devices(inputs, outputs, number)
        return BoundRun(_in_turn(bound.run), bound.cancel)

    def invoke(self, method: str, args: list[object], token: CancelToken) -> object:
        with TURN:
            if method == "release_captured_graph":
                for number in self._numbers.released(str(args[0]) if args else "0"):
                    self._backend.invoke(method, [number], token)
                return None
            if method.startswith("run_with_"):
                *rest, options = args
                args = [*rest, _numbered(options, self._number_of(method, rest, options))]
            return self._backend.invoke(method, args, token)

    def _number_of(self, method: str, args: Sequence[Any], options: object) -> int:
        if method != "run_with_iobinding":
            return NO_GRAPH
        config = options.get("config", {}) if isinstance(options, dict) else {}
        return self._numbers.number(config.get(OPTION), *args)


def _in_turn(run: Callback) -> Callable[[], None]:
    def run_in_turn() -> None:
        with TURN:
            run()

    return run_in_turn


def _numbered(options: object, number: int) -> Any:
    """Returns plain RunOptions with this number of a graph."""
    plain = options if isinstance(options, dict) else {}
    return {**plain, "config": {**plain.get("config", {}), OPTION: str(number)}}
