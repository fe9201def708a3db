"""InferenceSessionProxy: onnxruntime.InferenceSession's face on a model in a worker process.

Covers arguments, results and metadata as onnxruntime has them, and what is ours: TTL, ``session()``,
``unload()``, ``is_loaded``, ``close()``.  How a worker is found and called is :mod:`onnx_dl.client`'s.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Final, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from onnx_dl import config, installation, options
from onnx_dl.client import Kept, Lease, RemoteModel
from onnx_dl.errors import ConfigError, ProxyClosedError, UnsupportedValueError
from onnx_dl.host import ModelHost, default_host, digest_of
from onnx_dl.lifecycle import ModelState
from onnx_dl.model import ModelDescription, ModelSpec, file_identity, model_key
from onnx_dl.nodes import Description, ModelMetadata, NodeArg

_MISSING: Final = object()
_EXTRA: Final = ("enable_fallback", "read_config_from_model", "disabled_optimizers")


class InferenceSessionProxy:
    """A drop-in for ``onnxruntime.InferenceSession`` whose model lives in a process of its own.

    Nothing is loaded until the first use.  All proxies of one model (the same file, options and providers)
    share one worker process; calls from many threads run at the same time.

    Args:
        model_path: path of an .onnx or .ort file (str or PathLike), or the serialized model as bytes; also
            accepted by onnxruntime's own name, ``path_or_bytes``.
        sess_options: an ``onnxruntime.SessionOptions``, read now: later changes have no effect.
        providers: names, or (name, options) pairs, in order of preference.
        ttl: seconds without use after which the worker ends, as int, float or text such as ``"90s"`` or
            ``"5m"``; -1: never; 0: after each use.  The longest TTL of the proxies that used a model counts.
            For callers of onnxruntime's own signature a fourth positional argument that is a list is taken
            for ``provider_options``.
        provider_options: one dict per provider.
        host: the :class:`~onnx_dl.host.ModelHost` to use instead of the application's own.
        latency: ``"low"``: while calls follow each other within a fraction of a millisecond, both ends look
            for messages for at most 0.3 ms before they sleep: two wake-ups fewer per call, two busy cores
            meanwhile.  For small inputs and results; with megabytes it can be slower.  ``"normal"``: never.
        **kwargs: ``enable_fallback``, ``read_config_from_model`` and ``disabled_optimizers`` are passed on;
            others are ignored, as onnxruntime does.

    Raises:
        ValueError: ``ttl`` is none of the three modes, or ``latency`` neither of the two.
        TypeError: the model is neither a path nor bytes.
        onnxruntime's NoSuchFile: there is no such file.  A file that is not a model is refused at first use.
    """

    def __init__(
        self,
        model_path: str | bytes | os.PathLike[str] = _MISSING,  # type: ignore[assignment]
        sess_options: Any = None,
        providers: Sequence[Any] | None = None,
        ttl: float | str | Sequence[Any] | None = -1,
        provider_options: Sequence[Any] | None = None,
        *,
        path_or_bytes: str | bytes | os.PathLike[str] = _MISSING,  # type: ignore[assignment]
        host: ModelHost | None = None,
        latency: str = "normal",
        **kwargs: Any,
    ) -> None:
        if ttl is None or isinstance(ttl, list | tuple):
            provider_options = provider_options if ttl is None else ttl
            ttl = -1
        source = model_path if model_path is not _MISSING else path_or_bytes
        if source is _MISSING:
            raise TypeError("InferenceSessionProxy() needs a model: a path or the model's bytes")
        self._lease = Lease(config.parse_ttl(ttl), config.parse_latency(latency))
        self._model_path, self._model_bytes = _split_source(source)
        self._spec = _spec(
            self._model_path, self._model_bytes, sess_options, providers, provider_options, kwargs
        )
        self._host = host or default_host()
        self._description: Description | None = None
        self._described: ModelDescription | None = None
        self._remote: RemoteModel | None = None
        # The host by a weak reference: a callback registered there may hold this proxy, which would then hold
        # itself for ever.
        self._finalizer = weakref.finalize(
            self, _release, self._lease, weakref.ref(self._host), self._spec.key
        )
        # The interpreter's exit closes the host, which releases everything at once.
        self._finalizer.atexit = False

    # --- onnxruntime's face -------------------------------------------------------------------------------

    def run(
        self, output_names: Sequence[str] | None, input_feed: dict[str, Any], run_options: Any = None
    ) -> list[Any]:
        """One inference, as ``onnxruntime.InferenceSession.run``.

        Args:
            output_names: names of the outputs to compute; None or empty: all.
            input_feed: a value per input name: an array of any shape and fixed-size dtype, a text array, a
                list of numbers.
            run_options: an ``onnxruntime.RunOptions``, read now.

        Returns:
            One value per output, in order; arrays are writable, C-contiguous and the caller's own.

        Raises:
            WorkerDied: the worker ended during the call.
            Exception: what onnxruntime raises, as the same class with the same message.
        """
        feed = {
            name: value if type(value := input_feed[name]) is np.ndarray else _feedable(value)
            for name in input_feed.keys()  # noqa: SIM118  # a list has none, and onnxruntime says so
        }
        plain = None if run_options is None else options.read_run_options(run_options)
        result: list[Any] = self._model().run(self._lease, output_names, feed, plain)
        return result

    def _run_kept(self, output_names: Sequence[str], feed: dict[str, Any], run_options: Any) -> Kept:
        """:meth:`run` for a :class:`~onnx_dl.pipelines.Pipeline`, whose next stage reads the results."""
        feed = {name: _feedable(value) for name, value in feed.items()}
        plain = options.read_run_options(run_options)
        return self._model().keep(self._lease, output_names, feed, plain)

    def get_inputs(self) -> list[NodeArg]:
        """The model's inputs; the same list at each call."""
        return self._describe().inputs

    def get_outputs(self) -> list[NodeArg]:
        """The model's outputs; the same list at each call."""
        return self._describe().outputs

    def get_overridable_initializers(self) -> list[NodeArg]:
        """Initializers that a feed may override."""
        return self._describe().overridable_initializers

    def get_modelmeta(self) -> ModelMetadata:
        """What the model's author wrote into it."""
        return self._describe().modelmeta

    def get_providers(self) -> list[str]:
        """The execution providers in use, in order of preference."""
        return self._describe().providers

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        """The options in force for each provider in use."""
        return self._describe().provider_options

    def get_session_options(self) -> Any:
        """The options in force, as an ``onnxruntime.SessionOptions``: a copy; imports onnxruntime."""
        return options.make_session_options(self._describe().options)

    def end_profiling(self) -> str:
        """Ends profiling; the name of the profile, relative to the working directory, or '' if it was off."""
        return str(self._model().invoke(self._lease, "end_profiling"))

    # --- ours ---------------------------------------------------------------------------------------------

    @property
    def ttl(self) -> float:
        """Seconds without use after which the worker ends; -1: never; 0: after each use.  Settable."""
        return self._lease.ttl

    @ttl.setter
    def ttl(self, value: float | str) -> None:
        self._lease.ttl = config.parse_ttl(value)
        if (model := self._host.known_model(self._spec.key)) is not None:
            model.retime(self._lease, self._lease.ttl)

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray[Any]:
        """An array like ``numpy.empty``'s to build an input in, which then needs no copy.

        That holds for contiguous parts of it of 64 KiB or more, too; smaller ones are copied.  Any model of
        the same host takes it.  Do not write to it while a call with it runs.

        Raises:
            TypeError: the dtype has no fixed size.
            SharedMemoryError: the system has no memory for it.
        """
        return self._host.empty(shape, dtype)

    @property
    def is_loaded(self) -> bool:
        """Whether a worker has the model ready now.  Never loads it, and does not count as a use."""
        model = self._host.known_model(self._spec.key)
        status = model.status(measure=False) if model is not None else None
        return status is not None and status.state is ModelState.READY

    def load(self) -> None:
        """Loads the model now, so that its first call need not wait; returns when it is ready.

        Counts as a use: after a TTL without a call the model is unloaded again.  With ``ttl=0`` it waits for
        its first call.

        Raises: what the first call would raise.
        """
        self._model().load(self._lease)

    async def aload(self) -> None:
        """:meth:`load`, in a thread, for asyncio."""
        import asyncio  # costs 50 ms that most programs need not pay

        await asyncio.to_thread(self.load)

    @contextlib.contextmanager
    def session(self) -> Iterator[Self]:
        """Holds the model loaded for the block; its TTL starts when the last block ends.

        Blocks nest.  ``unload()`` waits for them; ``unload(force=True)`` does not.
        """
        model = self._model()
        model.hold(self._lease)
        try:
            yield self
        finally:
            model.unhold()

    def unload(self, *, force: bool = False, timeout: float | None = None) -> bool:
        """Ends the model's worker, for all its proxies, and waits until its memory is back.

        Running calls and ``session()`` blocks are waited for, unless ``force``: their callers then get
        :class:`~onnx_dl.errors.WorkerDied`.  The next use loads the model again.

        Returns:
            Whether there was a worker to end.

        Raises:
            UnloadTimeout: calls still ran after ``timeout`` seconds; the unload happens when they end.
        """
        model = self._host.known_model(self._spec.key)
        return model is not None and model.unload(force=force, timeout=timeout)

    def close(self) -> None:
        """Gives up the model; it is unloaded if no other proxy holds it.  May be called twice."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<InferenceSessionProxy of {self._spec.name}, ttl={self.ttl:g}>"

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """``isinstance(proxy, onnxruntime.InferenceSession)`` holds, because packages ask."""
        onnxruntime = sys.modules.get("onnxruntime")
        return getattr(onnxruntime, "InferenceSession", None) or InferenceSessionProxy

    # --- inside -------------------------------------------------------------------------------------------

    def _model(self) -> RemoteModel:
        model = self._remote
        if model is None or model.connection.closed:
            if self._lease.closed:
                raise ProxyClosedError(f"This proxy of {self._spec.name} is closed; make a new one.")
            installation.check()
            model = self._remote = self._host.model(self._spec, self._model_bytes)
        elif self._lease.closed:
            raise ProxyClosedError(f"This proxy of {self._spec.name} is closed; make a new one.")
        return model

    def _describe(self) -> Description:
        """Metadata, remembered: once known it is never asked for again, but counts as a use."""
        model = self._remote
        if self._description is not None and (model is None or model.connection.closed):
            return self._description
        described = self._model().describe(self._lease)
        if self._description is None or described is not self._described:
            self._description, self._described = Description(described), described
        return self._description


InferenceSession = InferenceSessionProxy


def _release(lease: Lease, host_ref: weakref.ref[ModelHost], key: str) -> None:
    """A proxy is closed or collected."""
    lease.closed = True
    host = host_ref()
    if host is not None and (model := host.known_model(key)) is not None:
        model.leave(lease)


def _feedable(value: Any) -> Any:
    """An OrtValue as the array that it holds; anything else as it is."""
    if type(value).__name__ != "OrtValue":
        return value
    try:
        return value.numpy()
    except Exception as error:
        raise UnsupportedValueError(
            f"This OrtValue cannot travel to a worker yet ({error}); feed a numpy array of another dtype."
        ) from error


def _split_source(source: object) -> tuple[str | None, bytes | None]:
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        if not os.path.exists(path):
            raise _no_such_file(path)
        return path, None
    if isinstance(source, bytes):
        return None, source
    raise TypeError(f"Unable to load from type '{type(source)}'")


def _no_such_file(path: str) -> Exception:
    """onnxruntime's own exception, in its own words."""
    installation.check()
    module = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    error: Exception = module.NoSuchFile(
        "[ONNXRuntimeError] : 3 : NO_SUCHFILE : "
        f"Load model from {path} failed:Load model {path} failed. File doesn't exist"
    )
    return error


def _spec(
    path: str | None,
    blob: bytes | None,
    sess_options: Any,
    providers: Any,
    provider_options: Any,
    kwargs: dict[str, Any],
) -> ModelSpec:
    """All that a worker needs to load the model, and the key that says which proxies share it."""
    digest = None if blob is None else digest_of(blob)
    how: dict[str, Any] = {
        "options": options.read_session_options(sess_options),
        "providers": options.read_providers(providers),
        "provider_options": options.read_providers(provider_options),
        "extra": {name: _extra(kwargs[name]) for name in _EXTRA if name in kwargs},
    }
    cwd = os.getcwd()
    try:
        f"{path}{cwd}".encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"The path {path!r} is not valid UTF-8; onnxruntime could not open it either. Rename the file."
        ) from None
    identity = digest if path is None else file_identity(path)
    return ModelSpec(
        # The working directory tells where a model given as bytes finds its external data, and profiles land.
        key=model_key(identity, how, cwd),
        name=path or f"bytes:{str(digest)[:12]}",
        cwd=cwd,
        path=path,
        blob=digest,
        **how,
    )


def _extra(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else value
