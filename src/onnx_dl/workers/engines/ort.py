"""onnxruntime as an engine."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np
import onnxruntime
from numpy.typing import NDArray

from onnx_dl.core import file_identity, model_files, parsing, settings
from onnx_dl.core.file_identity import ReadFile
from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import ModelDescription
from onnx_dl.ort.options import make_run_options
from onnx_dl.workers import saver
from onnx_dl.workers.cancellation import Halt
from onnx_dl.workers.engines import ort_session, shared_model, stable_load
from onnx_dl.workers.engines.base import Origin, Repeatable, Rerun, Save, Unsaved
from onnx_dl.workers.engines.ort_methods import Calls
from onnx_dl.workers.engines.ort_session import Opened
from onnx_dl.workers.load_cache import rules
from onnx_dl.workers.load_cache.store import Cache, Entry, folder

_SILENT: Final = 4
"""onnxruntime's log severity "fatal"."""


class OnnxRuntimeBackend:
    """One ``onnxruntime.InferenceSession``."""

    def __init__(self, spec: ModelSpec, blobs: Mapping[str, int], mapped: bool = False) -> None:
        """Raises what onnxruntime raises; ``mapped``: or :class:`~onnx_dl.workers.engines.base.Unsaved`."""
        self._spec = rules.with_engine_caches(spec, folder()) if _caching() else spec
        self._cached: Entry | None = None
        self._key = _key_of(spec)
        self._files: list[ReadFile] = []
        opened = self._open_cached()
        if opened is None and mapped:
            raise Unsaved(f"The load cache has {spec.name} no more, or in no form that can be used.")
        self._opened = opened or self._open(blobs)
        self._session = self._opened.session
        self._invoke = Calls(self._session, _with_options)
        self._profiling = bool((spec.options or {}).get("enable_profiling"))
        # Not tried with other providers: there, results come from another memory anyway.
        self._bindable = self._session.get_providers() == ["CPUExecutionProvider"]
        self._outputs = {node.name: node for node in self._session.get_outputs()}
        self._input_sizes = {size for node in self._session.get_inputs() for size in node.shape}
        ends = (*self._session.get_inputs(), *self._session.get_overridable_initializers())
        self._inputs = {node.name for node in ends}

    def _open(self, blobs: Mapping[str, int]) -> Opened:
        spec = self._spec
        blob = None if spec.blob is None else blobs[spec.blob]

        def memory() -> int | None:
            return None if spec.memory is None else os.dup(blobs[spec.memory])

        def make() -> Opened:
            return Opened(spec, None, memory()) if blob is None else shared_model.opened(spec, blob, memory)

        opened, self._files = stable_load.load(spec, lambda: stable_load.names_of(spec, blob), make)
        return opened

    def _open_cached(self) -> Opened | None:
        """A session of the saved form; None if there is none, or none that can be used."""
        store = _store()
        entry = store.find(self._key) if self._key is not None else None
        if entry is None or self._differs(entry):
            return None
        try:
            session = Opened(rules.loading(self._spec, entry.model), None)
        except Exception:  # whatever is wrong with it, the model itself will load or say why not
            store.discard(entry.key)
            return None
        if self._differs(entry):  # since then, so that a plain load has to find out what is there now
            return None
        self._cached = entry
        return session

    def _differs(self, entry: Entry) -> bool:
        """Whether an entry was made of other files than those that the model would be read from now."""
        return file_identity.changed(self._spec.where, entry.meta.description.files) is not None

    def origin(self) -> Origin:
        return Origin(self._key or "", self._cached is not None)

    def ready(self, seconds: float, blobs: Mapping[str, int]) -> list[Save]:
        slow = seconds >= settings.settings().cache_from
        on_cpu = self._session.get_providers() == ["CPUExecutionProvider"]
        if self._key is None or self._cached is not None or not (slow and on_cpu):
            return []
        mine = not settings.settings().cache_dir  # who names a folder knows what goes there
        nbytes = _bytes_of(self._spec, blobs)
        is_small = nbytes < rules.SMALLEST
        if is_small or _store().is_refused(self._key) or (mine and rules.is_passing(self._spec)):
            return []
        order = saver.Order(
            key=self._key,
            onnxruntime=_build(),
            spec=self._spec,
            description=self.describe(),
            nbytes=nbytes,
        )
        return [
            Save(
                self._key,
                nbytes,
                self._spec.blob,
                msgspec.json.encode(order).decode(),
                self._spec.environment,
            )
        ]

    def describe(self) -> ModelDescription:
        if self._cached is not None:  # the saved form has other options, and need not tell all
            return self._cached.meta.description
        return msgspec.structs.replace(ort_session.describe(self._opened), files=self._files)

    def run(
        self, outputs: Any, feed: dict[str, Any], options: dict[str, Any] | None, halt: Halt
    ) -> Sequence[Any]:
        fed = {name: _ended(value) for name, value in feed.items()}
        result: list[Any] = _with_options(lambda ro: self._session.run(outputs, fed, ro), options, halt)
        return result

    def run_async(
        self,
        outputs: Any,
        feed: dict[str, Any],
        options: dict[str, Any] | None,
        halt: Halt,
        started: Callable[[], object],
    ) -> Sequence[Any]:
        done = threading.Event()
        told: list[Any] = []

        def callback(results: list[Any], _: object, error: str) -> None:
            told[:] = results, error
            done.set()

        fed = {name: _ended(value) for name, value in feed.items()}

        def run(run_options: Any) -> None:
            self._session.run_async(outputs, fed, callback, None, run_options)
            started()
            done.wait()

        _with_options(run, options, halt)
        results, error = told
        if error:
            raise RuntimeError(error)
        return list(results)

    def repeat(self, outputs: Any, feed: dict[str, Any], results: list[NDArray[Any]]) -> Repeatable | None:
        names = list(outputs) if outputs else list(self._outputs)
        numeric = all(array.dtype.kind in "biuf" and array.dtype.isnative for array in feed.values())
        if not (self._bindable and numeric and len(set(names)) == len(names) == len(results)):
            return None
        if self._inputs & set(names):  # onnxruntime does not write these to where they are bound
            return None
        binding = self._session.io_binding()
        for name, array in feed.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in zip(names, results, strict=True):
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        options = onnxruntime.RunOptions()
        if not all(map(self._has_known_shape, names)):
            # A result of another shape than the last time is an error, which onnxruntime would log on stderr.
            options.log_severity_level = _SILENT
        # Not the Python method: with RunOptions it asks for an entry that is not there, which costs 28 µs.
        run = self._session._sess.run_with_iobinding
        return Repeatable(functools.partial(run, binding._iobinding, options), _end(options))

    def rerun(self, outputs: Any) -> Rerun:
        names = list(outputs) if outputs else list(self._outputs)
        options = onnxruntime.RunOptions()
        # Not the Python method: it checks names again and makes a list of all outputs, which costs 2 µs.
        run = self._session._sess.run
        return Rerun(lambda feed: run(names, feed, options), _end(options))

    def _has_known_shape(self, name: str) -> bool:
        """Whether the shapes of the inputs decide the shape of this output."""
        return all(isinstance(size, int) or size in self._input_sizes for size in self._outputs[name].shape)

    def invoke(self, method: str, args: list[Any], halt: Halt) -> Any:
        return self._invoke(method, args, halt)

    def close(self) -> None:
        if self._profiling:  # the profile is written when profiling ends
            self._session.end_profiling()


def open_model(spec: ModelSpec, blobs: Mapping[str, int], mapped: bool = False) -> OnnxRuntimeBackend:
    """The engine; raises what onnxruntime raises, and :class:`~onnx_dl.workers.engines.base.Unsaved`."""
    return OnnxRuntimeBackend(spec, blobs, mapped)


def _with_options(call: Callable[[Any], Any], options: dict[str, Any] | None, halt: Halt) -> Any:
    """Makes a call that can be ended.  That it has RunOptions, where the caller gave none, costs nothing."""
    run_options = onnxruntime.RunOptions() if options is None else make_run_options(options)
    halt.attach(_end(run_options))
    try:
        return call(run_options)
    except TypeError:  # refused before it ran; the text shows all arguments, so it must be the caller's
        if options is not None:
            raise
        return call(None)
    finally:
        halt.detach()


def _ended(value: Any) -> Any:
    """Byte strings with a NUL behind each: onnxruntime reads an item up to one, beyond its end if need be."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "S":
        return value.astype(f"S{value.dtype.itemsize + 1}")
    return value


def _end(run_options: Any) -> Callable[[], object]:
    return functools.partial(setattr, run_options, "terminate", True)


def _build() -> str:
    return f"{onnxruntime.__version__} {onnxruntime.get_build_info()}"


def _caching() -> bool:
    return settings.settings().cache == "on"


def _bytes_of(spec: ModelSpec, blobs: Mapping[str, int]) -> int:
    if spec.blob is not None:
        return os.fstat(blobs[spec.blob]).st_size
    return model_files.bytes_of(os.path.join(spec.cwd, spec.path or ""))


def _store() -> Cache:
    return Cache(folder(), parsing.parse_size(settings.settings().cache_limit))


def _key_of(spec: ModelSpec) -> str | None:
    """The model's key in the load cache; None: it loads plainly."""
    if not (_caching() and rules.is_cacheable(spec)):
        return None
    try:
        return rules.key_of(spec, _build())
    except OSError:  # onnxruntime shall say what is wrong with the file
        return None
