"""onnx-mlir as an engine: a model that ``onnx-mlir --EmitLib`` compiled to a shared library.

Covers its C ABI by ctypes, which releases the GIL for each call.  The rules are those of onnx-mlir's public
headers (include/OnnxMlirRuntime.h, include/onnx-mlir/Runtime/OMTensor.h, OMTensorList.h, OMEntryPoint.h,
OMSignature.h), and where these are silent what its own sessions do (src/Runtime/ExecutionSession.cpp,
PyExecutionSessionBase.cpp).

Runs of one model are made one after another.  The headers promise nothing about threads, a model compiled
with --instrument keeps its records in globals, and one compiled with --parallel uses all cores anyway.
Results are copied outside of that lock.  Nothing can end a run: the ABI has no call for that.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from ctypes import POINTER, c_char_p, c_int, c_int64, c_void_p
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onnx_dl.core import mlir_signature
from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import ModelDescription, TensorSpec
from onnx_dl.errors import EngineError
from onnx_dl.workers.cancellation import Halt
from onnx_dl.workers.engines import stable_load
from onnx_dl.workers.engines.base import Repeatable, Save

_DEFAULT: Final = "run_main_graph"
"""The entry point of a model that was compiled without a word about it."""

_RUNTIME: Final[dict[str, tuple[Any, list[Any]]]] = {
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
"""Result and arguments of what is the same in each compiled model."""
_QUERIES: Final[dict[str, tuple[Any, list[Any]]]] = {
    "omQueryEntryPoints": (POINTER(c_char_p), [POINTER(c_int64)]),
    "omInputSignature": (c_char_p, [c_char_p]),
    "omOutputSignature": (c_char_p, [c_char_p]),
}
"""What a model answers about itself.  With ``onnx-mlir --tag``, these have names that end in the tag, too."""


class Entry(NamedTuple):
    """One entry point."""

    name: str
    run: Callable[[int], int | None]
    input_signature: str
    output_signature: str
    inputs: Sequence[TensorSpec] | None
    """None: its signature cannot be read."""
    outputs: Sequence[TensorSpec] | None


class Foreign:
    """Memory of the library, for numpy to look at."""

    def __init__(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str) -> None:
        self.__array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "strides": strides,
            "typestr": dtype,
            "version": 3,
        }


class Library:
    """The functions of one compiled model."""

    def __init__(self, path: str, tag: str = "") -> None:
        """``tag``: what ``onnx-mlir --tag`` was given; empty: none, or the file's name, as is its default.

        Raises:
            EngineError: it is no shared library, or none that onnx-mlir made.
        """
        self._path = path
        self._stem = os.path.splitext(os.path.basename(path))[0].lower()
        # Constants that a model keeps in a file lie beside it; ExecutionSession.cpp sets this, too.
        os.environ.setdefault("OM_CONSTANT_PATH", os.path.dirname(path))
        try:
            self._om = ctypes.CDLL(path, use_errno=True)
        except OSError as error:
            raise EngineError(f"{path} cannot be loaded as a shared library: {error}. {_HINT}") from None
        self._suffix = self._find_suffix(tag)
        self._queries = {name: self._typed(name + self._suffix, *types) for name, types in _QUERIES.items()}
        runtime = {name: self._typed(name, *types) for name, types in _RUNTIME.items()}
        missing = [name for name, function in (self._queries | runtime).items() if function is None]
        if missing:
            raise EngineError(
                f"{path} is a shared library, but no compiled model: it lacks {', '.join(missing)}. {_HINT}"
            )
        self.entries = [self._entry(name) for name in self._names()]
        if not self.entries:
            raise EngineError(f"{path} has no entry points: omQueryEntryPoints names none. {_HINT}")
        # A name without the tag means the same function.
        tag = self._suffix or f"_{self._stem}"
        self._named = {e.name.removesuffix(tag): e for e in self.entries}
        self._named |= {e.name: e for e in self.entries}

    def _find_suffix(self, tag: str) -> str:
        suffixes = {"": ["", f"_{self._stem}"], "NONE": [""]}.get(tag.upper(), [f"_{tag}"])
        return next((s for s in suffixes if hasattr(self._om, f"omQueryEntryPoints{s}")), suffixes[0])

    def _typed(self, name: str, result: Any, arguments: list[Any]) -> Any:
        """A function of the library, which knows its types from then on; None if there is none."""
        function = getattr(self._om, name, None)
        if function is not None:
            function.restype, function.argtypes = result, arguments
        return function

    def _names(self) -> list[str]:
        found = self._queries["omQueryEntryPoints"](None)
        names: list[str] = []
        while found and found[len(names)] is not None:  # OMEntryPoint.h: the array ends with NULL
            names.append(_text(found[len(names)]))
        return names

    def _entry(self, name: str) -> Entry:
        function = self._typed(name, c_void_p, [c_void_p])
        if function is None:
            raise EngineError(
                f"{self._path} names {name} as an entry point, but has no such function. {_HINT}"
            )
        inputs, outputs = (
            _text(self._queries[query](name.encode())) for query in ("omInputSignature", "omOutputSignature")
        )
        return Entry(
            name, function, inputs, outputs, mlir_signature.parse(inputs), mlir_signature.parse(outputs)
        )

    @property
    def default(self) -> Entry | None:
        """What runs if no entry point is named."""
        return self._named.get(_DEFAULT) or (self.entries[0] if len(self.entries) == 1 else None)

    def find(self, name: str | None) -> Entry:
        """The entry point of that name, or the default one.

        Raises:
            EngineError: there is none.
        """
        entry = self.default if name is None else self._named.get(name)
        if entry is None:
            raise EngineError(mlir_signature.no_entry(self._path, name, [e.name for e in self.entries]))
        return entry

    def signatures(self) -> dict[str, list[str]]:
        """The two signatures of each entry point, under each of its names."""
        return {name: [e.input_signature, e.output_signature] for name, e in self._named.items()}

    def make_tensor(self, array: NDArray[Any]) -> int:
        """An OMTensor that looks at the array's memory; it does not own it."""
        shape = (c_int64 * array.ndim)(*array.shape)
        number = mlir_signature.NUMBERS[array.dtype]
        return _made(self._om.omTensorCreate(array.ctypes.data, shape, array.ndim, number))

    def make_list(self, tensors: Sequence[int]) -> int:
        """An OMTensorList of them, which copies the pointers: onnx-mlir's own session frees its own."""
        return _made(self._om.omTensorListCreate((c_void_p * len(tensors))(*tensors), len(tensors)))

    def tensors_of(self, found: int) -> list[int]:
        """The OMTensors of a list."""
        tensors: list[int] = self._om.omTensorListGetOmtArray(found)[: self._om.omTensorListGetSize(found)]
        return tensors

    def look_at(self, tensor: int) -> NDArray[Any]:
        """The tensor's own memory; its strides count elements (OMTensor.h), numpy's count bytes."""
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
        return np.asarray(Foreign(address, shape, strides, dtype.str))

    def destroy(self, lists: Iterable[int], tensors: Iterable[int]) -> None:
        """Frees each once, also if a model returned what it was given."""
        for found in set(lists):
            self._om.omTensorListDestroyShallow(found)
        for tensor in set(tensors):
            self._om.omTensorDestroy(tensor)


class OnnxMlirBackend:
    """One compiled model.  ``outputs`` of a call is a list of its entry point's name, or None: the default;
    its feed has the inputs in order, whatever their names."""

    def __init__(self, spec: ModelSpec) -> None:
        """Raises EngineError."""
        self._name = spec.name
        path = os.path.abspath(os.path.join(spec.cwd, spec.path or ""))
        tag = spec.extra.get("tag", "")
        self._library, self._files = stable_load.load(spec, lambda: [""], lambda: Library(path, tag))
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

    def ready(self, seconds: float, blobs: Mapping[str, int]) -> list[Save]:
        return []

    def run(
        self, outputs: Any, feed: dict[str, Any], options: dict[str, Any] | None, halt: Halt
    ) -> Sequence[Any]:
        results: list[NDArray[Any]] = []

        def take(found: list[NDArray[Any]]) -> None:
            results.extend(array.copy() for array in found)

        self._run(outputs, feed, take, lambda: halt.was_asked)
        return results

    def run_async(
        self,
        outputs: Any,
        feed: dict[str, Any],
        options: dict[str, Any] | None,
        halt: Halt,
        started: Callable[[], object],
    ) -> Sequence[Any]:
        started()
        return self.run(outputs, feed, options, halt)

    def repeat(self, outputs: Any, feed: dict[str, Any], results: list[NDArray[Any]]) -> Repeatable | None:
        stop = threading.Event()
        take = functools.partial(_copy_into, results)

        def run() -> None:
            try:
                self._run(outputs, feed, take, stop.is_set)
            finally:
                stop.clear()

        return Repeatable(run, stop.set)

    def rerun(self, outputs: Any) -> None:
        return None

    def invoke(self, method: str, args: list[Any], halt: Halt) -> Any:
        raise AttributeError(f"A model of onnx-mlir has no method {method!r}.")

    def close(self) -> None:
        pass

    def _run(
        self,
        outputs: Any,
        feed: dict[str, Any],
        take: Callable[[list[NDArray[Any]]], object],
        stopped: Callable[[], bool],
    ) -> None:
        """One run; ``take`` gets the results in the library's own memory, which is freed then."""
        entry = self._library.find(outputs[0] if outputs else None)
        inputs = list(feed.values())
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

    def _enter(self, entry: Entry, inputs: int, stopped: Callable[[], bool]) -> int:
        with self._lock:
            if stopped():
                raise EngineError(f"The call was told to end while it waited for another of {self._name}.")
            ctypes.set_errno(0)
            found = entry.run(inputs)
            number = ctypes.get_errno()
        if not found:  # ExecutionSession.cpp: an error, and errno says which
            why = f"{os.strerror(number)} ({errno.errorcode.get(number, number)})" if number else "no errno"
            raise EngineError(f"{entry.name} of {self._name} returned no results: {why}.")
        return found


def open_model(spec: ModelSpec, blobs: Mapping[str, int]) -> OnnxMlirBackend:
    """The engine.

    Raises:
        EngineError: the file is no compiled model; the message says what it lacks.
    """
    return OnnxMlirBackend(spec)


_HINT: Final = "Is it what `onnx-mlir --EmitLib` writes, for this kind of machine?"


def _copy_into(results: list[NDArray[Any]], found: list[NDArray[Any]]) -> None:
    for array, got in zip(results, found, strict=True):
        if got.shape != array.shape or got.dtype != array.dtype:
            raise ValueError("a result has another shape than the last time")
        array[...] = got


def _made(pointer: int | None) -> int:
    """OMTensor.h, OMTensorList.h: NULL if creation failed, which only memory can cause."""
    if not pointer:
        raise MemoryError("onnx-mlir's runtime had no memory for a tensor.")
    return pointer


def _text(raw: bytes | None) -> str:
    return "" if raw is None else raw.decode(errors="backslashreplace")
