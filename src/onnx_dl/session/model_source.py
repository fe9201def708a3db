"""Converts onnxruntime's constructor arguments to a :class:`~onnx_dl.core.spec.ModelSpec` and its memory."""

from __future__ import annotations

import errno
import hashlib
import importlib
import os
import weakref
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from onnx_dl.client.model_table import BlobSources
from onnx_dl.core.spec import ModelSpec, specify, working_directory
from onnx_dl.core.terms import WORKER_FIELDS, WorkerOptions
from onnx_dl.core.types import OrtObject, PlainDict, Providers
from onnx_dl.ort import options, recordings
from onnx_dl.system import installation, process_setup
from onnx_dl.tensors import shared_bytes
from onnx_dl.tensors.live_initializers import LiveMemory

KNOWN: Final = ("enable_fallback", "read_config_from_model", "disabled_optimizers")
"""Keywords of onnxruntime's constructor that are passed on."""


class ModelSource(NamedTuple):
    """A model to be loaded, with the memory that it is loaded from."""

    spec: ModelSpec
    blobs: BlobSources = MappingProxyType({})
    live: LiveMemory | None = None
    """Memory that the application may change between calls."""


def locate(source: object) -> tuple[str | None, bytes | None]:
    """Reads the constructor's first argument: a path or bytes; the other one is None.

    Raises:
        TypeError: it is neither, in onnxruntime's words.
        onnxruntime's NoSuchFile: there is no such file.
        onnxruntime's Fail: it cannot be looked at, a loop of links for one.
    """
    if isinstance(source, str | os.PathLike):
        path = str.__str__(os.fspath(source))
        try:
            if path:  # onnxruntime has an opinion of its own on ''
                os.stat(path)
        except ValueError:  # a NUL in it
            raise _cannot_look(path, errno.ENOENT) from None
        except OSError as error:
            raise _cannot_look(path, error.errno or errno.ENOENT) from None
        return path, None
    if isinstance(source, bytes):
        return None, source
    raise TypeError(f"Unable to load from type '{type(source)}'")


def _cannot_look(path: str, number: int) -> Exception:
    """onnxruntime's own exception, in its own words."""
    installation.check()
    module = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    kind, words = module.Fail, f"1 : FAIL : Load model from {path} failed:system error number {number}"
    if number == errno.ENOENT:
        kind = module.NoSuchFile
        words = (
            f"3 : NO_SUCHFILE : Load model from {path} failed:Load model {path} failed. File doesn't exist"
        )
    error: Exception = kind(f"[ONNXRuntimeError] : {words}")
    return error


_memories: weakref.WeakKeyDictionary[OrtObject, LiveMemory] = weakref.WeakKeyDictionary()
"""One for each SessionOptions: all proxies that were given it share the memory."""


def _memory_of(sess_options: OrtObject, found: recordings.PortableCalls | None) -> LiveMemory | None:
    if found is None or not found.arrays:
        return None
    memory = _memories.get(sess_options)
    if memory is None or len(memory.places) != len(found.arrays):  # it was told more since
        memory = _memories[sess_options] = LiveMemory(found.arrays, found.owners)
    return memory


def describe(
    location: tuple[str | None, bytes | None],
    sess_options: OrtObject,
    providers: tuple[Providers, Providers],
    kwargs: Mapping[str, object],
    worker: WorkerOptions,
) -> ModelSource:
    """All that a worker needs to load the model, and the key that says which proxies share it.

    ``location``: as from :func:`locate`; ``providers``: and ``provider_options``.

    Raises:
        AttributeError: ``sess_options`` is no SessionOptions, in onnxruntime's words.
        ConfigError: an argument cannot reach a worker; the message names it.
    """
    if not (sess_options or any(providers)):
        sess_options = None  # onnxruntime does not look at it
    plain, found = options.record_session_options(sess_options)
    live = _memory_of(sess_options, found)
    if plain is not None and live is not None:
        plain["places"] = live.places
    process_wide = recordings.process_settings()
    recordings.check_process_settings(process_wide, plain)
    how = {
        "options": plain,
        **_providers(*providers, {name: _plain(kwargs[name]) for name in KNOWN if name in kwargs}),
        "memory": None if live is None else live.name,
        "surroundings": process_wide,
        **worker.fields(),
    }
    if worker.isolation:
        options.check_addresses(how)
    path, data = location
    digest = None if data is None else hashlib.sha256(data).hexdigest()
    spec = specify(path, digest, working_directory(), how)
    blobs: dict[str, Callable[[], int]] = {}
    if data is not None and digest is not None:
        blobs[digest] = _kept(digest, data)
    if live is not None:
        blobs[live.name] = live.descriptor
    return ModelSource(spec, blobs, live)


def _kept(digest: str, data: bytes) -> Callable[[], int]:
    """A function that opens descriptors of these bytes, which the caller need not keep."""
    process_setup.fill_standard_streams()
    return shared_bytes.keep(digest, data).descriptor


def with_providers(spec: ModelSpec, providers: Providers, provider_options: Providers) -> ModelSpec:
    """The same model with other providers, and without falling back to others, which is for constructors.
    Raises like :func:`describe`."""
    extra = {name: value for name, value in spec.extra.items() if name in KNOWN} | {"enable_fallback": 0}
    kept = {name: getattr(spec, name) for name in ("options", "memory", "surroundings", *WORKER_FIELDS)}
    kept |= {} if spec.isolation else {"isolation": False}
    asked = _providers(providers, provider_options, extra)
    if spec.isolation:
        options.check_addresses(asked)
    return specify(spec.path, spec.blob, spec.cwd, kept | asked)


def _providers(providers: Providers, provider_options: Providers, extra: PlainDict) -> PlainDict:
    if not options.are_accepted(providers) or not isinstance(provider_options, list | tuple | None):
        given = [options.encode_refused(providers), options.encode_refused(provider_options)]
        return {"providers": None, "provider_options": None, "extra": extra | {"given": given}}
    if isinstance(providers, tuple):
        extra = extra | {"tuple": True}  # it is shown where a provider fails
    return {
        "providers": options.read_providers(providers),
        "provider_options": options.read_providers(provider_options),
        "extra": extra,
    }


def _plain(value: object) -> object:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value
