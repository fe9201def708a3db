"""onnxruntime's constructor arguments as a :class:`~onnx_dl.core.spec.ModelSpec`, with the memory they name."""

from __future__ import annotations

import errno
import functools
import hashlib
import importlib
import os
import weakref
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from onnx_dl.core.environment import NOTHING, Environment
from onnx_dl.core.parsing import Allowances
from onnx_dl.core.spec import ModelSpec, specify, working_directory
from onnx_dl.ort import options, recordings
from onnx_dl.system import installation, platform, process_setup
from onnx_dl.tensors import segment, shared_bytes
from onnx_dl.tensors.live_initializers import LiveMemory

KNOWN: Final = ("enable_fallback", "read_config_from_model", "disabled_optimizers")
"""Of onnxruntime's constructor, beside those that have a place of their own."""


class Source(NamedTuple):
    """A model to be loaded."""

    spec: ModelSpec
    memory: dict[str, Callable[[], int]]
    """For each of the spec's blobs, what makes a descriptor of it."""
    live: LiveMemory | None
    """What the application may change between calls."""


def locate(source: object) -> tuple[str | None, bytes | None]:
    """The path or the bytes that a model was given as.

    Raises:
        TypeError: it is neither, in onnxruntime's words.
        onnxruntime's NoSuchFile: there is no such file.
        onnxruntime's Fail: it cannot be looked at, a loop of links for one.
    """
    if isinstance(source, str | os.PathLike):
        path = str.__str__(os.fspath(source))
        if path and (number := _error_of(path)):  # onnxruntime has an opinion of its own on ''
            raise _cannot_look(path, number)
        return path, None
    if isinstance(source, bytes):
        return None, source
    raise TypeError(f"Unable to load from type '{type(source)}'")


def _error_of(path: str) -> int:
    """The error number of looking at a file; 0 if there is none."""
    try:
        os.stat(path)
    except ValueError:  # a NUL in it
        return errno.ENOENT
    except OSError as error:
        return error.errno or errno.ENOENT
    return 0


def _cannot_look(path: str, number: int) -> Exception:
    """onnxruntime's own exception, in its own words."""
    installation.check()
    module = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    failed = f"Load model from {path} failed:"
    error: Exception
    if number == errno.ENOENT:
        error = module.NoSuchFile(
            f"[ONNXRuntimeError] : 3 : NO_SUCHFILE : {failed}Load model {path} failed. File doesn't exist"
        )
    else:
        error = module.Fail(f"[ONNXRuntimeError] : 1 : FAIL : {failed}system error number {number}")
    return error


_memories: weakref.WeakKeyDictionary[Any, LiveMemory] = weakref.WeakKeyDictionary()
"""The workers of all proxies that were given the same options see the same memory."""


def _memory_of(sess_options: Any, found: recordings.PortableCalls | None) -> LiveMemory | None:
    if found is None or not found.arrays:
        return None
    memory = _memories.get(sess_options)
    if memory is None or len(memory.places) != len(found.arrays):  # it was told more since
        memory = _memories[sess_options] = LiveMemory(found.arrays, found.owners)
    return memory


def describe(
    path: str | None,
    data: bytes | None,
    sess_options: Any,
    providers: Any,
    provider_options: Any,
    kwargs: dict[str, Any],
    allowances: Allowances,
    group: str | None = None,
    environment: Environment = NOTHING,
) -> Source:
    """All that a worker needs to load the model, and the key that says which proxies share it.

    Raises:
        AttributeError: ``sess_options`` is no SessionOptions, in onnxruntime's words.
        ConfigError: an argument cannot reach a worker; the message names it.
    """
    if not (sess_options or providers or provider_options):
        sess_options = None  # onnxruntime does not look at it
    plain, found = options.record_session_options(sess_options)
    live = _memory_of(sess_options, found)
    if plain is not None and live is not None:
        plain["places"] = live.places
    process_wide = recordings.process_settings()
    recordings.check_process_settings(process_wide, plain)
    how: dict[str, Any] = {
        "options": plain,
        **_providers(providers, provider_options, _extras(kwargs)),
        "memory": None if live is None else live.name,
        "surroundings": process_wide,
        **allowances._asdict(),
        "group": group,
        "environment": environment,
    }
    digest = None if data is None else hashlib.sha256(data).hexdigest()
    spec = specify(path, digest, working_directory(), how)
    memory: dict[str, Callable[[], int]] = {}
    if data is not None and digest is not None:
        memory[digest] = _kept(digest, data)
    if live is not None:
        memory[live.name] = live.descriptor
    return Source(spec, memory, live)


def _kept(digest: str, data: bytes) -> Callable[[], int]:
    """What makes descriptors of these bytes.  The caller may let go of them."""
    if not platform.is_platform():  # the first use says so
        return functools.partial(segment.freeze, data)
    process_setup.fill_standard_streams()
    return shared_bytes.keep(digest, data).descriptor


def with_providers(spec: ModelSpec, providers: Any, provider_options: Any) -> ModelSpec:
    """The same model with other providers, and without falling back to others, which is for constructors.

    Raises: like :func:`describe`.
    """
    extra = {name: value for name, value in spec.extra.items() if name in KNOWN} | {"enable_fallback": 0}
    how = {
        "options": spec.options,
        **_providers(providers, provider_options, extra),
        "memory": spec.memory,
        "surroundings": spec.surroundings,
        **Allowances(spec.max_memory, spec.max_memory_hard, spec.max_runs)._asdict(),
        "group": spec.group,
        "environment": spec.environment,
    }
    return specify(spec.path, spec.blob, spec.cwd, how)


def _providers(providers: Any, provider_options: Any, extra: dict[str, Any]) -> dict[str, Any]:
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


def _extras(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: _sorted(kwargs[name]) for name in KNOWN if name in kwargs}


def _sorted(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value
