"""Hosts for the user: the default one, shared ones by name, and starting one ahead of its first use."""

from __future__ import annotations

import contextlib
import threading

from onnx_dl.client import host_registry
from onnx_dl.client.host_client import HostClient
from onnx_dl.concurrency.spawning import Thread
from onnx_dl.core.settings import DEFAULT_HOST, settings
from onnx_dl.errors import OnnxDLError
from onnx_dl.host.model_host import ModelHost
from onnx_dl.system import resources


def default_host() -> ModelHost:
    """The host of every proxy that names no other: this application's own, or the shared one that
    ``ONNX_DL_HOST`` names."""
    return _model_host(host_registry.default_host())


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
        PlatformError: this system has no worker processes.
        SupervisorError: there is none, and it is not to be started.
        SupervisorStartError: it does not come up, or refuses us.
    """
    if name is None:
        name = settings().host or DEFAULT_HOST
    resources.check_platform()
    host = _model_host(host_registry.shared_host(name, start=start))
    host.start()
    return host


def warm_up() -> threading.Thread:
    """Starts the default host's processes in the background, while the application is still busy.

    The first use of a model then need not wait for them, and raises what went wrong.  Returns the thread,
    for ``join()``.
    """
    host = default_host()

    def start() -> None:
        with contextlib.suppress(OnnxDLError):
            host.start()

    thread = Thread(start, "onnx-dl-warm-up")
    thread.start()
    return thread


def _model_host(host: HostClient) -> ModelHost:
    assert isinstance(host, ModelHost)  # the factory that onnx_dl sets makes no other
    return host
