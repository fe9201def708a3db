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
    """The host of all proxies that are made without ``host=``.

    It is this application's own, or the shared host that ``ONNX_DL_HOST`` names.
    """
    return _model_host(host_registry.default_host())


def connect(name: str | None = None, *, start: bool = True) -> ModelHost:
    """Connects to a host that all applications of this user share, and starts it if it does not run.

    A host that is started here runs in the background, with this application's ``ONNX_DL_*`` settings and
    Python environment, until it has had no client and no model for a minute (``ONNX_DL_LINGER``).  If it is
    restarted, calls continue at the new one; only calls that had begun at the old one raise SupervisorDied.

    Args:
        name: name of the host; None: the name in ``ONNX_DL_HOST``, or ``"default"``.
        start: whether to start the host if it does not run.

    Raises:
        ConfigError: (a ValueError) the name is not valid.
        PlatformError: this system has no worker processes.
        SupervisorError: the host does not run, and ``start`` is False.
        SupervisorStartError: the host did not start, or refused the connection.
    """
    if name is None:
        name = settings().host or DEFAULT_HOST
    resources.check_platform()
    host = _model_host(host_registry.shared_host(name, start=start))
    host.start()
    return host


def warm_up() -> threading.Thread:
    """Starts the default host's processes in the background, for example while the program still imports.

    The first use of a model then does not wait for them.  If they cannot start, that use raises the error.

    Returns:
        The thread that starts them, for ``join()``.
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
