"""Hosts of this process by name: the default one, and shared ones.

Imports nothing heavy: ``import onnx_dl`` imports this and sets the function that makes hosts.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx_dl.client.host_client import HostClient
    from onnx_dl.concurrency.forking import Guard

_make: Callable[[str | None], HostClient]
_default: HostClient | None = None
_shared: weakref.WeakValueDictionary[str, HostClient] = weakref.WeakValueDictionary()
_guards: dict[None, Guard] = {}


def set_factory(make: Callable[[str | None], HostClient]) -> None:
    """Sets the function that makes a host: the shared one of a name, or, for None, one of this process."""
    global _make
    _make = make


def _guard() -> Guard:
    from onnx_dl.concurrency.forking import Guard

    return _guards.setdefault(None, Guard())  # one step: all threads get the same one


def default_host() -> HostClient:
    """The host of every proxy that names no other: this application's own, or the shared one that
    ``ONNX_DL_HOST`` names."""
    from onnx_dl.core.settings import settings

    global _default
    if (known := _default) is not None:
        return known
    name = _usable(settings().host)
    made = shared_host(name) if name else _make(None)
    with _guard().alone():
        known = _default = _default or made  # another thread may have been faster
    return known


def _usable(name: str) -> str:
    """The name of a shared host; empty where there are no shared hosts."""
    from onnx_dl.system import resources

    if name and not resources.is_platform():
        warnings.warn(f"ONNX_DL_HOST={name} has no effect: this system has no shared hosts.", stacklevel=4)
        return ""
    return name


def shared_host(name: str, *, start: bool = True) -> HostClient:
    """The shared host of this name, which is looked for at its first use.  Raises ConfigError if it is no
    name."""
    from onnx_dl.transport.rendezvous import HostEntry

    HostEntry(name)
    if (host := _shared.get(name)) is None:
        made = _make(name)
        with _guard().alone():
            host = _shared.setdefault(name, made)
    host.link.starts = start
    return host
