"""onnxruntime as an engine."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, TypeVar

import msgspec
import numpy as np
import onnxruntime

from onnx_dl.core import digests, model_files, settings
from onnx_dl.core.model_files import ReadFile
from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import ModelDescription
from onnx_dl.ort.options import make_run_options
from onnx_dl.tensors.device_values import DeviceTensor
from onnx_dl.workers.engines import base, ort_bindings, ort_session
from onnx_dl.workers.engines.base import (
    Array,
    BoundRun,
    Callback,
    CancelToken,
    Feed,
    NotInCache,
    Options,
    Origin,
    Rerun,
    Results,
)
from onnx_dl.workers.engines.cuda_graphs import GraphBackend
from onnx_dl.workers.engines.ort_methods import SessionMethods
from onnx_dl.workers.engines.ort_session import LoadedSession
from onnx_dl.workers.load_cache import rules
from onnx_dl.workers.load_cache.rules import SavedForm, SaveOrder
from onnx_dl.workers.load_cache.store import CacheEntry, folder, open_cache

_T = TypeVar("_T")

_FATAL: Final = 4
"""onnxruntime's log severity."""


class OnnxRuntimeBackend:
    """One ``onnxruntime.InferenceSession``."""

    def __init__(self, spec: ModelSpec, blobs: Mapping[str, int], mapped: bool = False) -> None:
        """Loads the model; ``mapped``: from the load cache, or raises NotInCache."""
        # A saver has all rights, and caches of providers are written: not for a model that is not trusted.
        caching = settings.settings().cache == "on" and not spec.sandbox
        self._spec = rules.with_engine_caches(spec, folder()) if caching else spec
        self._cached: CacheEntry | None = None
        self._form = rules.form_of(spec) if caching else None
        self._key = None if self._form is None else _key_of(spec)
        self._unusable: str | None = None
        self._files: list[ReadFile] = []
        loaded = self._load_cached(None if spec.blob is None else blobs[spec.blob])
        if loaded is None and mapped:
            raise NotInCache(f"The load cache no longer has {spec.name} in a usable form.")
        self._loaded = loaded or self._load(blobs)
        self._refuse_unusable()
        self._session = self._loaded.session
        self.captures_graphs = any(
            str(options.get("enable_cuda_graph", "0")).lower() in ("1", "true")
            for options in self._session.get_provider_options().values()
        )
        """True if memory that a run is bound to is used by later runs, whatever they are bound to."""
        self._profiling = bool((spec.options or {}).get("enable_profiling"))
        in_use = self._session.get_providers(), self._session.get_provider_options()
        self._binding_rule = ort_bindings.rule_of(*in_use)
        self.cuda_device = ort_bindings.cuda_device(*in_use)
        """Number of the GPU that the session uses by CUDA's provider; None: it uses none."""
        self._methods = SessionMethods(self._session, _with_options, self.cuda_device)
        is_on_cpu = in_use[0] == ["CPUExecutionProvider"]
        self._has_arena = is_on_cpu and bool(self._session.get_session_options().enable_cpu_mem_arena)
        self._outputs = {node.name: node for node in self._session.get_outputs()}
        self._input_sizes = {size for node in self._session.get_inputs() for size in node.shape}
        ends = (*self._session.get_inputs(), *self._session.get_overridable_initializers())
        self._inputs = {node.name for node in ends}
        self._shapes = {node.name: node.shape for node in (*ends, *self._outputs.values())}

    def _load(self, blobs: Mapping[str, int]) -> LoadedSession:
        spec = self._spec
        blob = None if spec.blob is None else blobs[spec.blob]

        def memory() -> int | None:
            return None if spec.memory is None else os.dup(blobs[spec.memory])

        def load() -> LoadedSession:
            if blob is None:
                return LoadedSession(spec, None, memory())
            return ort_session.load_from_memory(spec, blob, memory)

        loaded, self._files = base.load_unchanged(spec, lambda: ort_session.files_of(spec, blob), load, blob)
        return loaded

    def _load_cached(self, blob: int | None) -> LoadedSession | None:
        """Loads the saved form; None if there is none that can be used.

        Raises:
            ModelDigestMismatch: the files that it was made of are not those that ``sha256`` says.
        """
        store = open_cache()
        entry = store.find(self._key) if self._key is not None else None
        if entry is None or self._differs(entry):
            return None
        names = [*([] if blob is None else [""]), *(file.name for file in entry.meta.description.files)]
        given, where = self._spec.sha256, base.places(self._spec, blob)
        stamps = digests.check(given, names, where)
        try:
            session = LoadedSession(rules.loading(self._spec, entry.model), None)
        except Exception:  # a plain load follows, which raises if the model itself is at fault
            if self._form is SavedForm.EXTERNAL:
                self._unusable = entry.key
            else:
                store.discard(entry.key)
            return None
        if self._differs(entry) or stamps != digests.stamps(
            given, names, where
        ):  # changed during the load: a plain load reads the files that are there now
            return None
        self._cached = entry
        return session

    def _refuse_unusable(self) -> None:
        """Removes an entry in the external form that did not load where the model itself did, for ever.  If
        both fail, memory of the device ran out, for example, and the entry is not at fault.  Nor is one that
        another process removed or damaged meanwhile."""
        store = open_cache()
        if self._unusable is not None and store.find(self._unusable) is not None:
            store.discard(self._unusable)
            with contextlib.suppress(OSError):  # the cache may be read-only
                store.refuse(self._unusable)

    def _differs(self, entry: CacheEntry) -> bool:
        """Tells whether an entry was made of other files than those that the model would be read from now."""
        return model_files.changed(self._spec.where, entry.meta.description.files) is not None

    def origin(self) -> Origin:
        return Origin(self._key or "", self._cached is not None)

    def ready(self, seconds: float, blobs: Mapping[str, int]) -> list[SaveOrder]:
        form, slow = self._form, seconds >= settings.settings().cache_from
        if form is None or self._key is None or self._cached is not None or not slow:
            return []
        is_external = form is SavedForm.EXTERNAL and any(file.name for file in self._files)
        if is_external or not form.serves(self._session.get_providers()):
            return []
        # In a folder that the user named, files of the temporary folder are cached, too.
        is_passing = not settings.settings().cache_dir and rules.is_temporary(self._spec)
        blob = self._spec.blob
        nbytes = model_files.bytes_of(self._spec.where("")) if blob is None else os.fstat(blobs[blob]).st_size
        is_small = nbytes < form.value
        if is_small or is_passing or open_cache().is_refused(self._key):
            return []
        build, description = _build(), self.describe()
        return [
            SaveOrder(
                key=self._key, onnxruntime=build, spec=self._spec, description=description, nbytes=nbytes
            )
        ]

    def describe(self) -> ModelDescription:
        files = self._files
        if self._cached is not None:
            if self._form is SavedForm.OPTIMIZED:  # it has other options and may lack metadata
                return self._cached.meta.description
            files = self._cached.meta.description.files
        return msgspec.structs.replace(ort_session.describe(self._loaded), files=files)

    def run(self, outputs: object, feed: Feed, options: Options, token: CancelToken) -> Results:
        fed = {name: _terminated(value) for name, value in feed.items()}
        result: Results = _with_options(
            lambda run_options: self._session.run(outputs, fed, run_options), options, token
        )
        return result

    def run_async(
        self, outputs: object, feed: Feed, options: Options, token: CancelToken, started: Callback
    ) -> Results:
        done = threading.Event()
        outcome: list[tuple[Results, str]] = []

        def callback(results: Results, _: object, error: str) -> None:
            outcome.append((results, error))
            done.set()

        fed = {name: _terminated(value) for name, value in feed.items()}

        def run(run_options: onnxruntime.RunOptions) -> None:
            self._session.run_async(outputs, fed, callback, None, run_options)
            started()
            done.wait()

        _with_options(run, options, token)
        ((results, error),) = outcome
        if error:
            raise RuntimeError(error)
        return list(results)

    def bind(self, outputs: object, feed: Feed, results: Sequence[Array]) -> BoundRun | None:
        names = self._names(outputs)
        arrays = {name: value for name, value in feed.items() if isinstance(value, np.ndarray)}
        inputs = {
            n: array for n, array in arrays.items() if array.dtype.kind in "biuf" and array.dtype.isnative
        }
        unique = len(set(names)) == len(names) == len(results)
        rule = self._binding_rule
        if rule is None or not (len(inputs) == len(feed) and unique):
            return None
        if self._inputs & set(names):  # onnxruntime does not write these to where they are bound
            return None
        places = dict(zip(names, results, strict=True))
        if rule.device is not None and not ort_bindings.are_certain(self._shapes, inputs, places):
            return None
        options = onnxruntime.RunOptions()
        if not all(map(self._has_known_shape, names)):
            # A result of another shape than the last one is an error, which onnxruntime would log on stderr.
            options.log_severity_level = _FATAL
        run = ort_bindings.bound_run(self._session, rule, inputs, places, options)
        return BoundRun(run, _canceller(options))

    def bind_devices(
        self,
        inputs: Sequence[tuple[str, DeviceTensor]],
        outputs: Sequence[tuple[str, DeviceTensor]],
        graph: int | None = None,
    ) -> BoundRun:
        """Binds a run.  ``graph``: number of its CUDA graph, if the session captures these."""
        return ort_bindings.on_devices(self._session, inputs, outputs, graph)

    def rerun(self, outputs: object) -> Rerun:
        names = self._names(outputs)
        options = onnxruntime.RunOptions()
        # Not the Python method: it checks names again and makes a list of all outputs, which costs 2 µs.
        run = self._session._sess.run
        return Rerun(lambda feed: run(names, feed, options), _canceller(options))

    def _names(self, outputs: object) -> list[str]:
        return list(outputs) if outputs and isinstance(outputs, Iterable) else list(self._outputs)

    def _has_known_shape(self, name: str) -> bool:
        """Tells whether the shapes of the inputs decide the shape of this output."""
        return all(isinstance(size, int) or size in self._input_sizes for size in self._outputs[name].shape)

    def trim(self) -> None:
        """Returns memory of the session's arena that no run uses to the system.

        onnxruntime does that only at the end of a run.  This one is told to end before its first node.  The
        arena keeps its first region: its default strategy is kNextPowerOfTwo, which shrinks only the others.
        """
        if not self._has_arena or self._profiling:  # the user's profile would have this run
            return
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        options.log_severity_level = _FATAL
        options.terminate = True
        with contextlib.suppress(Exception):  # that it was told to end; or it has no such arena
            self._session._sess.run(list(self._outputs)[:1], {}, options)

    def invoke(self, method: str, args: list[object], token: CancelToken) -> object:
        return self._methods(method, args, token)

    def close(self) -> None:
        if self._profiling:  # the profile is written when profiling ends
            self._session.end_profiling()


def open_model(spec: ModelSpec, blobs: Mapping[str, int], mapped: bool = False) -> base.Backend:
    """Loads the model; see :class:`OnnxRuntimeBackend`."""
    backend = OnnxRuntimeBackend(spec, blobs, mapped)
    return GraphBackend(backend) if backend.captures_graphs else backend


def _with_options(call: Callable[[onnxruntime.RunOptions], _T], options: Options, token: CancelToken) -> _T:
    """Makes a call that can be cancelled.  RunOptions where the caller gave none cost nothing."""
    run_options = onnxruntime.RunOptions() if options is None else make_run_options(options)
    token.attach(_canceller(run_options))
    try:
        return call(run_options)
    except TypeError:  # refused before it ran; the text shows all arguments, so it must show the caller's
        if options is not None:
            raise
        return call(None)
    finally:
        token.detach()


def _terminated(value: object) -> object:
    """Appends a NUL to items of byte string arrays: onnxruntime reads up to one, even beyond their end."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "S":
        return value.astype(f"S{value.dtype.itemsize + 1}")
    return value


def _canceller(run_options: onnxruntime.RunOptions) -> Callback:
    return functools.partial(setattr, run_options, "terminate", True)


def _build() -> str:
    return f"{onnxruntime.__version__} {onnxruntime.get_build_info()}"


def _key_of(spec: ModelSpec) -> str | None:
    """Returns the model's key in the load cache; None: it is not cached."""
    try:
        return rules.key_of(spec, _build())
    except OSError:  # onnxruntime raises its own error about the file
        return None
