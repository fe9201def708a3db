"""Patches ``onnxruntime.InferenceSession`` so that its sessions live in workers.

For packages that do not know onnx-dl.  The class object stays the same, so earlier imports and subclasses of
it work: its constructor opens a proxy, and its methods call that proxy.  Sessions that stay in-process all
the same are reported.  Our own processes do not run this.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import gc
import importlib
import logging
import os
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self, TypeAlias

from onnx_dl.client.host_client import HostClient
from onnx_dl.concurrency.forking import Guard, still
from onnx_dl.core import own_sessions
from onnx_dl.core.types import OrtObject
from onnx_dl.errors import ConfigError, PlatformError
from onnx_dl.integrations.patch_settings import checked
from onnx_dl.session.inference_session import InferenceSessionProxy
from onnx_dl.system import installation

logger = logging.getLogger("onnx_dl")

_C: Final = "onnxruntime.capi.onnxruntime_pybind11_state"
_PROXY: Final = "_onnx_dl_proxy"
"""Attribute of a session that has its proxy."""
_Settings: TypeAlias = dict[str, Any]
_Init: TypeAlias = Callable[..., None]


class Unpatched(NamedTuple):
    """A session that lives in this process although :func:`patch` is in force."""

    model: str
    """Path of the model, as it was given."""
    reason: str
    """Reason why the model is in this process."""
    where: str
    """File and line that made the session, if known."""

    def __str__(self) -> str:
        return f"{self.model}: in-process, because {self.reason} ({self.where})"


@dataclass(eq=False)
class Patch:
    """Settings in force from :func:`patch` to :func:`unpatch`; as a context manager, for the block."""

    _defaults: _Settings
    _models: list[tuple[str, _Settings]]
    """Globs and the settings of models that match."""
    _host: HostClient | None

    def settings_of(self, model: str) -> _Settings:
        """Settings of this model.  Of several globs that match, later ones override earlier ones."""
        found = dict(self._defaults)
        for glob, more in self._models:
            if fnmatch.fnmatch(model, glob) or fnmatch.fnmatch(os.path.basename(model), glob):
                found |= more
        return found

    def open(
        self, settings: _Settings, args: tuple[OrtObject, ...], kwargs: _Settings
    ) -> InferenceSessionProxy:
        """Opens a proxy.  ``args``, ``kwargs``: of onnxruntime's own constructor."""

        def wanted(name: str) -> bool:
            return name != "environment" or settings.get("isolation") is not False

        source, sess_options, providers, provider_options = args
        return InferenceSessionProxy(
            source,
            sess_options,
            providers,
            provider_options=provider_options,
            host=self._host,
            **{name: value for name, value in settings.items() if wanted(name)},
            **{name: value for name, value in kwargs.items() if name not in settings and name != "host"},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        with _lock.alone():
            if self in _active:
                _active.remove(self)
            _restore_if_idle()


def patch(
    *,
    ttl: float | str = -1,
    latency: str = "auto",
    eager: bool = True,
    environment: Mapping[str, str | None] | None = None,
    models: Mapping[str, Mapping[str, object]] | None = None,
    host: HostClient | None = None,
) -> Patch:
    """Has ``onnxruntime.InferenceSession`` open models in workers, in all code of this process.

    Args:
        ttl: as for :class:`~onnx_dl.InferenceSessionProxy`.
        latency: as for :class:`~onnx_dl.InferenceSessionProxy`.
        eager: load a model when its session is made, because packages may catch onnxruntime's errors there.
        environment: as for :class:`~onnx_dl.InferenceSessionProxy`.
        models: settings of single models by glob of path or file name, for example
            ``{"vad*.onnx": {"ttl": -1}, "tiny*": {"isolation": False}}`` (or ``"in_process": True``; see
            docs/in-process.md); of several that match, the later counts.
        host: the host to use instead of the application's own.

    Returns:
        A context manager whose end undoes this patch, as :func:`unpatch` undoes the latest.

    Raises:
        ConfigError: a setting does not exist, or its value is not allowed.
        InstallationError: there is no onnxruntime, or it is too old.
    """
    installation.check()
    given = {"ttl": ttl, "latency": latency, "eager": eager, "environment": environment}
    defaults = checked(given, "patch()")
    made = Patch(defaults, [(glob, checked(more, glob)) for glob, more in (models or {}).items()], host)
    with _lock.alone():
        _active.append(made)
        _replace()
    return made


def unpatch() -> None:
    """Undoes the latest patch.  Sessions that it made go on working."""
    with _lock.alone():
        if _active:
            _active.pop()
        _restore_if_idle()


def unpatched_report() -> list[Unpatched]:
    """Sessions that live in this process although a worker could have them, each with the reason."""
    onnxruntime = sys.modules.get("onnxruntime")
    if onnxruntime is None:
        return []
    session_class = onnxruntime.InferenceSession
    found = [
        Unpatched(str(vars(made).get("_model_path") or "a model given as bytes"), _EARLIER, "unknown")
        for made in gc.get_objects()
        if issubclass(type(made), session_class) and _PROXY not in vars(made) and made not in _known
    ]
    return [*found, *_noted]


# --- the class ---------------------------------------------------------------------------------------------

_EARLIER: Final = "no patch() was in force when it was made"
_lock: Final = Guard()
_active: list[Patch] = []
_noted: list[Unpatched] = []
_known: weakref.WeakSet[OrtObject] = weakref.WeakSet()
_undo: list[Callable[[], None]] = []
"""Functions that restore the constructors.  Methods stay patched, for sessions that still have a proxy."""


def _replace() -> None:
    if _undo:
        return
    with still():  # not importing(): onnx-dl run patches at the end of onnxruntime's own import
        session_class = importlib.import_module("onnxruntime").InferenceSession
    native_class = importlib.import_module(_C).InferenceSession
    if "__getattr__" not in vars(session_class):
        _delegate(session_class)
    for cls, make in ((session_class, _opening), (native_class, _noting)):
        original = cls.__init__
        cls.__init__ = make(original)
        _undo.append(functools.partial(setattr, cls, "__init__", original))


def _restore_if_idle() -> None:
    while _undo and not _active:
        _undo.pop()()


def _opening(original: _Init) -> _Init:
    """A constructor that opens a proxy, or, where that is not possible, an in-process session."""

    @functools.wraps(original)
    def __init__(
        self: OrtObject,
        path_or_bytes: OrtObject,
        sess_options: OrtObject = None,
        providers: OrtObject = None,
        provider_options: OrtObject = None,
        **kwargs: OrtObject,
    ) -> None:
        args = (path_or_bytes, sess_options, providers, provider_options)
        if own_sessions.are_made_here():
            _known.add(self)
            return original(self, *args, **kwargs)
        name = _name_of(path_or_bytes)
        patched = _active[-1]
        settings = patched.settings_of(name)
        try:
            self.__dict__[_PROXY] = patched.open(settings, args, kwargs)
            if settings.get("isolation") is False:
                _note(Unpatched(name, "its settings say so", _caller()))
            return None
        except (ConfigError, PlatformError) as error:
            if settings.get("sandbox") or settings.get("sha256"):
                raise  # a session in this process has no sandbox and checks no file
            reason = str(error)
        _note(Unpatched(name, reason, _caller()))
        _known.add(self)
        with own_sessions.making():
            original(self, *args, **kwargs)
        return None

    return __init__


def _noting(original: _Init) -> _Init:
    """A native constructor that reports the session: sessions built from the native class are not proxied."""

    @functools.wraps(original)
    def __init__(self: OrtObject, options: OrtObject, source: object, *args: object) -> None:
        original(self, options, source, *args)
        where = _caller()
        if not own_sessions.are_made_here() and "onnx_dl" not in where:
            _note(Unpatched(_name_of(source), "it was made with onnxruntime's native class", where))

    return __init__


def _note(unpatched: Unpatched) -> None:
    _noted.append(unpatched)
    logger.warning("%s", unpatched)


def _name_of(source: object) -> str:
    if isinstance(source, bytes):
        return "a model given as bytes"
    return os.fspath(source) if isinstance(source, str | os.PathLike) else repr(source)


def _caller() -> str:
    """File and line of the code that called onnxruntime."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        module = frame.f_globals.get("__name__", "")
        if module != __name__ and module.partition(".")[0] != "onnxruntime":
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _delegate(session_class: OrtObject) -> None:
    """Has the methods call the proxy, if the session has one."""
    for cls in reversed(session_class.__mro__):
        for name, original in list(vars(cls).items()):
            if callable(original) and (name == "_reset_session" or not name.startswith("_")):
                setattr(session_class, name, _asking(name, original))

    def __getattr__(self: OrtObject, name: str) -> OrtObject:
        proxy = self.__dict__.get(_PROXY)
        # Python's own protocols, such as copying, are for the session and not for the proxy.
        if proxy is not None and not (name.startswith("__") and name.endswith("__")):
            with contextlib.suppress(AttributeError):
                return getattr(proxy, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    session_class.__getattr__ = __getattr__


def _asking(name: str, original: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(original)
    def method(self: OrtObject, *args: object, **kwargs: object) -> object:
        proxy = self.__dict__.get(_PROXY)
        return original(self, *args, **kwargs) if proxy is None else getattr(proxy, name)(*args, **kwargs)

    return method
