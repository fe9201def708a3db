"""ExecutionSession: the face of onnx-mlir's Python runtime on a model in a worker process.

Has that class's methods, arguments and results, as in its docs/UsingPyRuntime.md.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence

from onnx_dl.client.cancellation import CancelWatch, not_begun
from onnx_dl.client.host_client import HostClient
from onnx_dl.concurrency.deadline import Deadline, DeadlinePassed
from onnx_dl.core import digests, mlir_signature
from onnx_dl.core.parsing import parse_timeout
from onnx_dl.core.spec import ModelSpec, model_identity, model_key, without_trust, working_directory
from onnx_dl.core.terms import Terms, WorkerOptions
from onnx_dl.core.types import Array, PlainDict
from onnx_dl.errors import EngineError
from onnx_dl.session import isolation as isolated
from onnx_dl.session.model_handle import ModelHandle
from onnx_dl.session.model_source import ModelSource
from onnx_dl.session.proxy import ModelProxy


class ExecutionSession(ModelProxy):
    """A model that ``onnx-mlir --EmitLib`` compiled, in a process of its own.

    Nothing is loaded until the first use.  All sessions of one file share one worker process, whichever entry
    point they use.  Their runs are made one after another: onnx-mlir promises nothing about threads.

    Args:
        shared_lib_path: path of the compiled model, ``model.so``.
        tag: the argument of ``onnx-mlir --tag``, if the library has only functions whose names end in it.
        use_default_entry_point: for callers of onnx-mlir's own class; makes no difference here.
        ttl: seconds without use after which the worker ends; see :class:`~onnx_dl.InferenceSessionProxy`.
        host: the :class:`~onnx_dl.host.model_host.ModelHost` to use instead of the application's own.
        latency: ``"auto"``, ``"normal"`` or ``"low"``; see :class:`~onnx_dl.InferenceSessionProxy`.
        pin: the model is not evicted to make room for others.
        priority: models of lower priority are evicted first.
        max_memory: bytes after a run above which the worker is replaced; see
            :class:`~onnx_dl.InferenceSessionProxy`.
        max_memory_hard: bytes above which the worker is ended during a run; see
            :class:`~onnx_dl.InferenceSessionProxy`.
        max_runs: number of runs after which the worker is replaced.
        group: models that name the same share one worker; see :class:`~onnx_dl.InferenceSessionProxy`.
        environment: variables for this model's worker; see :class:`~onnx_dl.InferenceSessionProxy`.
        isolation: False: the model runs in this process; see :class:`~onnx_dl.InferenceSessionProxy`.
        sha256: digest of the only file that is accepted; see :class:`~onnx_dl.InferenceSessionProxy`.
        sandbox: the worker has no network and few rights; see :class:`~onnx_dl.InferenceSessionProxy`.
        entry_point: the entry point to run; None: ``run_main_graph``, or the only one that there is.
        eager: load the model now, so that errors are raised here.

    Raises:
        FileNotFoundError: there is no such file.
        EngineError: it is no compiled model.  Unless ``eager``, that is found at first use.
        ConfigError: (a ValueError) an argument is not valid; the message names it.
    """

    def __init__(
        self,
        shared_lib_path: str | os.PathLike[str],
        tag: str = "",
        use_default_entry_point: bool = True,
        *,
        ttl: float | str = -1,
        host: HostClient | None = None,
        latency: str = "auto",
        pin: bool = False,
        priority: int = 0,
        max_memory: int | str | None = None,
        max_memory_hard: int | str | None = None,
        max_runs: int | None = None,
        group: str | None = None,
        environment: Mapping[str, str | None] | None = None,
        isolation: bool | None = None,
        sha256: str | Mapping[str, str] | None = None,
        sandbox: bool = False,
        entry_point: str | None = None,
        eager: bool = False,
    ) -> None:
        worker = WorkerOptions.parse(max_memory, max_memory_hard, max_runs, group, environment)
        worker = isolated.applied(worker.with_trust(sha256, sandbox), isolation)
        spec = _spec_of(os.fspath(shared_lib_path), tag, worker)
        super().__init__(ModelSource(spec), Terms.parse(ttl, latency, pin, priority), host)
        self._entry_point = entry_point
        if eager:
            self.load()
            self._signatures(entry_point)

    def run(self, inputs: Sequence[Array], *, timeout: float | None = None) -> list[Array]:
        """One inference.

        Args:
            inputs: an array per input, in order, of any layout and of a dtype that the model takes.
            timeout: seconds after which the caller goes on without the result.  Compiled code cannot be
                stopped: later runs wait for it, or ``unload(force=True)`` ends it with its worker.

        Returns:
            One array per output, in order; writable, C-contiguous and the caller's own.

        Raises:
            TypeError: an input is no array, or of another dtype than the model takes.
            ValueError: too many inputs, too few, or of a shape that the model was not compiled for.
            EngineError: the model refused to run, or is none.
            RunTimeout: ``timeout`` passed.
            WorkerDied: the worker ended during the call.
            MemoryLimitExceeded: it did, because it had more memory than ``max_memory_hard``.
        """
        mlir_signature.check_types(inputs)
        deadline = None if timeout is None else Deadline.of(parse_timeout(timeout))
        name = None if self._entry_point is None else [self._entry_point]
        feed = {str(index): array for index, array in enumerate(inputs)}
        watch = None if deadline is None else CancelWatch(deadline=deadline)
        try:
            model = self._handle.model(deadline)
            known = model.description  # if there is none, or no such entry point, the worker says so
            if known is not None and (found := _signatures_of(known.details, self._entry_point)) is not None:
                mlir_signature.check(mlir_signature.parse(found[0]), inputs)
            result: list[Array] = model.run(self._handle.lease, name, feed, None, watch)
        except DeadlinePassed as passed:
            raise not_begun(deadline, passed) from None
        return result

    def input_signature(self) -> str:
        """The inputs of the entry point in use, as the JSON text that the library has."""
        return self._signatures(self._entry_point)[0]

    def output_signature(self) -> str:
        """The outputs of the entry point in use, as the JSON text that the library has."""
        return self._signatures(self._entry_point)[1]

    def entry_points(self) -> list[str]:
        """Names of all entry points."""
        return list(self._handle.describe().details["entry_points"])

    def __getstate__(self) -> tuple[object, ...]:
        return (self._entry_point,)

    def __setstate__(self, state: tuple[ModelHandle, str | None]) -> None:
        self._handle, self._entry_point = state

    def set_entry_point(self, name: str) -> None:
        """Has this session use another entry point.  Raises EngineError if there is none of that name."""
        self._signatures(name)
        self._entry_point = name

    def _signatures(self, name: str | None) -> list[str]:
        details = self._handle.describe().details
        if (found := _signatures_of(details, name)) is None:
            raise EngineError(mlir_signature.no_entry(self._handle.spec.name, name, details["entry_points"]))
        return found


def _signatures_of(details: PlainDict, name: str | None) -> list[str] | None:
    """The signatures of the inputs and the outputs; None if there is no such entry point."""
    known: dict[str | None, list[str]] = details["signatures"]
    return known.get(details["default_entry_point"] if name is None else name)


def _spec_of(path: str, tag: str, worker: WorkerOptions) -> ModelSpec:
    if not os.path.exists(path):
        raise FileNotFoundError(
            errno.ENOENT, "There is no compiled model here (onnx-mlir --EmitLib writes one)", path
        )
    extra = {"tag": tag} if tag else {}
    how = worker.fields() | {"sha256": digests.of_model(worker.sha256, path)}
    trust = without_trust({name: how[name] for name in ("sha256", "sandbox", "isolation") if name in how})
    return ModelSpec(
        key=model_key(
            model_identity(path),
            "onnx_mlir",
            extra,
            worker.limits,
            worker.group,
            worker.environment,
            *([trust] if trust else []),
        ),
        name=path,
        cwd=working_directory(),
        engine="onnx_mlir",
        path=path,
        extra=extra,
        **how,
    )
