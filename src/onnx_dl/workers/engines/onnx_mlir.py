"""onnx-mlir as an engine: a model that ``onnx-mlir --EmitLib`` compiled to a shared library.

Calls its C ABI with ctypes, which releases the GIL for each call.  The rules are those of onnx-mlir's public
headers (include/OnnxMlirRuntime.h, include/onnx-mlir/Runtime/OMTensor.h, OMTensorList.h, OMEntryPoint.h,
OMSignature.h); where these say nothing, the code does what onnx-mlir's own sessions do
(src/Runtime/ExecutionSession.cpp, PyExecutionSessionBase.cpp).

Runs of one model are made one after another.  The headers promise nothing about threads, a model compiled
with --instrument keeps its records in globals, and one compiled with --parallel uses all cores anyway.
Results are copied outside of that lock.  A run cannot be ended: the ABI has no call for that.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import math
import os
import threading
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from ctypes import POINTER, c_char_p, c_int, c_int64, c_void_p
from typing import Any, Final, NamedTuple

import numpy as np

from onnx_dl.core import mlir_signature
from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import ModelDescription, TensorSpec
from onnx_dl.errors import EngineError
from onnx_dl.workers.engines import base
from onnx_dl.workers.engines.base import Array, BoundRun, Callback, CancelToken, Feed, Options, Results
from onnx_dl.workers.load_cache.rules import SaveOrder

_DEFAULT: Final = "run_main_graph"
"""Entry point of a model that was compiled without options for it."""

_Signature = tuple[Any, list[Any]]
"""ctypes of a function's result and arguments."""
_RUNTIME: Final[dict[str, _Signature]] = {
    "omTensorCreate": (c_void_p, [c_void_p, POINTER(c_int64), c_int64, c_int]),
    "omTensorDestroy": (None, [c_void_p]),
    "omTensorGetDataPtr": (c_void_p, [c_void_p]),
    "omTensorGetShape": (POINTER(c_int64), [c_void_p]),
    "omTensorGetStrides": (POINTER(c_int64), [c_void_p]),
    "omTensorGetRank": (c_int64, [c_void_p]),
    "omTensorGetDataType": (c_int, [c_void_p]),
    "omTensorListCreate": (c_void_p, [POINTER(c_void_p), c_int64]),
    "omTensorListGetOmtArray": (POINTER(c_void_p), [c_void_p]),
    "omTensorListGetSize": (c_int64, [c_void_p]),
    "omTensorListDestroyShallow": (None, [c_void_p]),
}
"""Functions that are the same in each compiled model."""
_QUERIES: Final[dict[str, _Signature]] = {
    "omQueryEntryPoints": (POINTER(c_char_p), [POINTER(c_int64)]),
    "omInputSignature": (c_char_p, [c_char_p]),
    "omOutputSignature": (c_char_p, [c_char_p]),
}
"""Functions that describe a model.  With ``onnx-mlir --tag``, the tag is appended to their names, too."""
_HINT: Final = "Is it what `onnx-mlir --EmitLib` writes, for this kind of machine?"


class EntryPoint(NamedTuple):
    """A function of a compiled model that runs it."""

    name: str
    run: Callable[[int], int | None]
    input_signature: str
    output_signature: str
    inputs: Sequence[TensorSpec] | None
    """None: the signature cannot be parsed."""
    outputs: Sequence[TensorSpec] | None


class Library:
    """The functions of one compiled model."""

    def __init__(self, path: str, tag: str = "") -> None:
        """``tag``: the argument of ``onnx-mlir --tag``; empty: none, or its default, the file's name.

        Raises:
            EngineError: the file is not a shared library that onnx-mlir made.
        """
        self._path = path
        self._stem = os.path.splitext(os.path.basename(path))[0].lower()
        # Folder of constants that a model keeps in a file; ExecutionSession.cpp sets this, too.
        os.environ.setdefault("OM_CONSTANT_PATH", os.path.dirname(path))
        try:
            self._om = ctypes.CDLL(path, use_errno=True)
        except OSError as error:
            raise EngineError(f"{path} cannot be loaded as a shared library: {error}. {_HINT}") from None
        self._suffix = self._find_suffix(tag)
        self._queries = {name: self._function(name + self._suffix, types) for name, types in _QUERIES.items()}
        runtime = {name: self._function(name, types) for name, types in _RUNTIME.items()}
        missing = [name for name, function in (self._queries | runtime).items() if function is None]
        if missing:
            raise EngineError(
                f"{path} is a shared library, but no compiled model: it lacks {', '.join(missing)}. {_HINT}"
            )
        self.entries = [self._entry(name) for name in self._names()]
        if not self.entries:
            raise EngineError(f"{path} has no entry points: omQueryEntryPoints names none. {_HINT}")
        # Entry points are found with and without the tag.
        tag = self._suffix or f"_{self._stem}"
        self._named = {e.name.removesuffix(tag): e for e in self.entries}
        self._named |= {e.name: e for e in self.entries}

    def _find_suffix(self, tag: str) -> str:
        suffixes = {"": ["", f"_{self._stem}"], "NONE": [""]}.get(tag.upper(), [f"_{tag}"])
        return next((s for s in suffixes if hasattr(self._om, f"omQueryEntryPoints{s}")), suffixes[0])

    def _function(self, name: str, types: _Signature) -> Any:
        """Returns a function of the library with its types set; None if there is none."""
        function = getattr(self._om, name, None)
        if function is not None:
            function.restype, function.argtypes = types
        return function

    def _names(self) -> list[str]:
        found = self._queries["omQueryEntryPoints"](None)
        names: list[str] = []
        while found and found[len(names)] is not None:  # OMEntryPoint.h: the array ends with NULL
            names.append(_text(found[len(names)]))
        return names

    def _entry(self, name: str) -> EntryPoint:
        function = self._function(name, (c_void_p, [c_void_p]))
        if function is None:
            raise EngineError(
                f"{self._path} names {name} as an entry point, but has no such function. {_HINT}"
            )
        inputs, outputs = (
            _text(self._queries[query](name.encode())) for query in ("omInputSignature", "omOutputSignature")
        )
        return EntryPoint(
            name, function, inputs, outputs, mlir_signature.parse(inputs), mlir_signature.parse(outputs)
        )

    @property
    def default(self) -> EntryPoint | None:
        """The entry point that runs if none is named."""
        return self._named.get(_DEFAULT) or (self.entries[0] if len(self.entries) == 1 else None)

    def find(self, name: str | None) -> EntryPoint:
        """Returns the entry point of that name, or the default one.

        Raises:
            EngineError: there is none.
        """
        entry = self.default if name is None else self._named.get(name)
        if entry is None:
            raise EngineError(mlir_signature.no_entry(self._path, name, [e.name for e in self.entries]))
        return entry

    def signatures(self) -> dict[str, list[str]]:
        """Returns input and output signature of each entry point, under each of its names."""
        return {name: [e.input_signature, e.output_signature] for name, e in self._named.items()}

    def make_tensor(self, array: Array) -> int:
        """Makes an OMTensor that uses the array's memory and does not own it."""
        shape = (c_int64 * array.ndim)(*array.shape)
        number = mlir_signature.NUMBERS[array.dtype]
        return _made(self._om.omTensorCreate(array.ctypes.data, shape, array.ndim, number))

    def make_list(self, tensors: Sequence[int]) -> int:
        """Makes an OMTensorList.  It copies the pointers: onnx-mlir's session frees its own array of them."""
        return _made(self._om.omTensorListCreate((c_void_p * len(tensors))(*tensors), len(tensors)))

    def tensors_of(self, found: int) -> list[int]:
        """Returns the OMTensors of a list."""
        tensors: list[int] = self._om.omTensorListGetOmtArray(found)[: self._om.omTensorListGetSize(found)]
        return tensors

    def look_at(self, tensor: int) -> Array:
        """Returns a view of the tensor's memory.  OMTensor.h counts strides in elements, numpy in bytes."""
        number = self._om.omTensorGetDataType(tensor)
        dtype = mlir_signature.DTYPES.get(number)
        if dtype is None:
            raise TypeError(
                f"The model returned a tensor of OM_DATA_TYPE {number}, which numpy does not have."
            )
        rank = self._om.omTensorGetRank(tensor)
        shape = tuple(self._om.omTensorGetShape(tensor)[:rank])
        if not math.prod(shape):
            return np.empty(shape, dtype)
        address = self._om.omTensorGetDataPtr(tensor)
        if not address:
            raise EngineError(f"The model returned a tensor of shape {shape} without data.")
        strides = tuple(stride * dtype.itemsize for stride in self._om.omTensorGetStrides(tensor)[:rank])
        view = {
            "data": (address, False),
            "shape": shape,
            "strides": strides,
            "typestr": dtype.str,
            "version": 3,
        }
        return np.asarray(types.SimpleNamespace(__array_interface__=view))

    def destroy(self, lists: Iterable[int], tensors: Iterable[int]) -> None:
        """Frees each of them once, also if a model returned one of its inputs."""
        for found in set(lists):
            self._om.omTensorListDestroyShallow(found)
        for tensor in set(tensors):
            self._om.omTensorDestroy(tensor)


class OnnxMlirBackend:
    """One compiled model.  ``outputs`` of a call is a list with the name of an entry point, or None: the
    default one.  The feed has the inputs in order; their names do not matter."""

    def __init__(self, spec: ModelSpec) -> None:
        """Loads the model; raises EngineError."""
        self._name = spec.name
        path = os.path.abspath(os.path.join(spec.cwd, spec.path or ""))
        tag = spec.extra.get("tag", "")
        self._library, self._files = base.load_unchanged(
            spec, lambda: ["", *_constants(path)], lambda: Library(path, tag)
        )
        self._lock = threading.Lock()

    def describe(self) -> ModelDescription:
        entry = self._library.default
        return ModelDescription(
            inputs=list((entry and entry.inputs) or ()),
            outputs=list((entry and entry.outputs) or ()),
            details={
                "entry_points": [entry.name for entry in self._library.entries],
                "default_entry_point": entry and entry.name,
                "input_signature": entry and entry.input_signature,
                "output_signature": entry and entry.output_signature,
                "signatures": self._library.signatures(),
            },
            files=self._files,
        )

    def ready(self, seconds: float, blobs: Mapping[str, int]) -> list[SaveOrder]:
        return []

    def run(self, outputs: object, feed: Feed, options: Options, token: CancelToken) -> Results:
        results: list[Array] = []

        def take(found: list[Array]) -> None:
            results.extend(array.copy() for array in found)

        self._run(outputs, feed, take, lambda: token.is_cancelled)
        return results

    def run_async(
        self, outputs: object, feed: Feed, options: Options, token: CancelToken, started: Callback
    ) -> Results:
        started()
        return self.run(outputs, feed, options, token)

    def bind(self, outputs: object, feed: Feed, results: Sequence[Array]) -> BoundRun | None:
        stop = threading.Event()
        take = functools.partial(_copy_into, results)

        def run() -> None:
            try:
                self._run(outputs, feed, take, stop.is_set)
            finally:
                stop.clear()

        return BoundRun(run, stop.set)

    def rerun(self, outputs: object) -> None:
        return None

    def invoke(self, method: str, args: list[object], token: CancelToken) -> object:
        raise AttributeError(f"A model of onnx-mlir has no method {method!r}.")

    def close(self) -> None:
        pass

    def _run(
        self, outputs: object, feed: Feed, take: Callable[[list[Array]], object], stopped: Callable[[], bool]
    ) -> None:
        """Runs the model; ``take`` gets the results in the library's memory, which is freed after it."""
        entry = self._library.find(str(outputs[0]) if isinstance(outputs, list) and outputs else None)
        inputs: list[Any] = list(feed.values())
        mlir_signature.check_types(inputs)
        mlir_signature.check(entry.inputs, inputs)
        arrays = [array if array.flags.c_contiguous else array.copy() for array in inputs]
        library = self._library
        tensors = [library.make_tensor(array) for array in arrays]
        lists = [library.make_list(tensors)]
        try:
            lists.append(self._enter(entry, lists[0], stopped))
            tensors += library.tensors_of(lists[1])
            take([library.look_at(tensor) for tensor in tensors[len(arrays) :]])
        finally:
            library.destroy(lists, tensors)

    def _enter(self, entry: EntryPoint, inputs: int, stopped: Callable[[], bool]) -> int:
        with self._lock:
            if stopped():
                raise EngineError(f"The call was cancelled while it waited for another call of {self._name}.")
            ctypes.set_errno(0)
            found = entry.run(inputs)
            number = ctypes.get_errno()
        if not found:  # ExecutionSession.cpp: an error, described by errno
            why = f"{os.strerror(number)} ({errno.errorcode.get(number, number)})" if number else "no errno"
            raise EngineError(f"{entry.name} of {self._name} returned no results: {why}.")
        return found


def open_model(spec: ModelSpec, blobs: Mapping[str, int]) -> OnnxMlirBackend:
    """Loads a model; raises EngineError if the file is not a compiled model."""
    return OnnxMlirBackend(spec)


def _constants(path: str) -> list[str]:
    """Returns the name of the file that ``onnx-mlir --store-constants-to-file`` writes, if there is one."""
    found = f"{os.path.splitext(path)[0]}.constants.bin"
    return [os.path.basename(found)] if os.path.exists(found) else []


def _copy_into(results: Sequence[Array], found: list[Array]) -> None:
    for array, got in zip(results, found, strict=True):
        if got.shape != array.shape or got.dtype != array.dtype:
            raise ValueError("a result has another shape than the last time")
        array[...] = got


def _made(pointer: int | None) -> int:
    """Checks a new object.  OMTensor.h, OMTensorList.h: NULL if creation failed, for lack of memory only."""
    if not pointer:
        raise MemoryError("onnx-mlir's runtime had no memory for a tensor.")
    return pointer


def _text(raw: bytes | None) -> str:
    return "" if raw is None else raw.decode(errors="backslashreplace")
