"""The hosts of this process that nobody needs to pass around: the default one, and shared ones by name.

What a host is and does is :mod:`onnx_dl.host.model_host`'s.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import Final

from onnx_dl.concurrency.forking import Guard
from onnx_dl.concurrency.threads import Thread
from onnx_dl.core.settings import settings
from onnx_dl.errors import OnnxDLError
from onnx_dl.host.model_host import ModelHost
from onnx_dl.transport.rendezvous import DEFAULT_HOST, HostEntry

_default: ModelHost | None = None
_shared_hosts: weakref.WeakValueDictionary[str, ModelHost] = weakref.WeakValueDictionary()
_lock: Final = Guard()


def default_host() -> ModelHost:
    """The host of every proxy that names no other: this application's own, or the shared one that
    ``ONNX_DL_HOST`` names."""
    global _default
    if (known := _default) is not None:
        return known
    name = settings().host
    made = shared_host(name) if name else ModelHost()
    with _lock.alone():
        known = _default = _default or made  # another thread may have been faster
    return known


def shared_host(name: str, *, start: bool = True) -> ModelHost:
    """The shared host of this name; it is looked for when it is first used."""
    HostEntry(name)  # a name that cannot be is an error now
    if (host := _shared_hosts.get(name)) is None:
        made = ModelHost()
        made.name = name
        with _lock.alone():
            host = _shared_hosts.setdefault(name, made)
    host.starts = start
    return host


def connect(name: str | None = None, *, start: bool = True) -> ModelHost:
    """A host that all applications of this user share: the one of this name, found or started.

    One that is started here runs in the background, with this application's ``ONNX_DL_*`` settings and its
    Python environment, until it has had no client and no model for a minute (``ONNX_DL_LINGER``).  When it is
    restarted, calls go on with the new one; only those that the old one had begun raise SupervisorDied.

    Args:
        name: None: what ``ONNX_DL_HOST`` says, or else ``"default"``.
        start: whether to start it if there is none.

    Raises:
        ValueError: (as :class:`~onnx_dl.errors.ConfigError`) it is no name.
        SupervisorError: there is none, and it is not to be started.
        SupervisorStartError: it does not come up, or refuses us.
    """
    if name is None:
        name = settings().host or DEFAULT_HOST
    host = shared_host(name, start=start)
    host.start()
    return host


def warm_up() -> threading.Thread:
    """Starts the default host's processes in the background, while the application is still busy.

    The first use of a model then need not wait for them.  What goes wrong is told to that first use.  Returns
    the thread that does it, for whoever wants to ``join()``.
    """
    host = default_host()

    def start() -> None:
        with contextlib.suppress(OnnxDLError):
            host.start()

    thread = Thread(start, "onnx-dl-warm-up")
    thread.start()
    return thread
