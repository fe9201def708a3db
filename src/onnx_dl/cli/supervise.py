"""``onnx-dl supervise``: a shared host in the foreground, for a terminal or a service manager."""

from __future__ import annotations

import secrets

import msgspec

from onnx_dl.core.settings import DEFAULT_HOST, settings
from onnx_dl.errors import SupervisorError
from onnx_dl.protocol.codec import PROTOCOL_VERSION
from onnx_dl.supervisor.main import Orders, serve
from onnx_dl.system import process_setup, resources
from onnx_dl.transport.rendezvous import HostEntry
from onnx_dl.transport.sockets import fresh_address


def supervise(name: str = DEFAULT_HOST, **given: str | int | None) -> None:
    """Runs the host of this name until SIGTERM or Ctrl-C; prints what happens to models on stdout.

    If an application has started a host of this name in the background, waits until that host ends, which is
    when its clients have gone.  An earlier host of another version ends likewise, without being waited for.

    ``given``: fields of :class:`~onnx_dl.core.settings.Settings` that replace those of the environment.

    Raises:
        ConfigError: (a ValueError) a name or setting is not valid.
        SupervisorError: a managed host of this name runs already, or another process waits to be the next.
    """
    resources.check_platform()
    process_setup.set_up_process()
    chosen = {field: value for field, value in given.items() if value is not None}
    orders = Orders(
        address=fresh_address("host"),
        secret=secrets.token_hex(16),
        settings=msgspec.structs.replace(settings(), **chosen),
        protocol=PROTOCOL_VERSION,
        host=name,
        explicit=list(chosen),
        foreground=True,
    )
    entry = HostEntry(name)
    _become_host(entry)
    serve(orders, entry)


def _become_host(entry: HostEntry) -> None:
    """Makes this process the host: at once, or after the host in the background has ended."""
    holder = None
    while holder is None:  # the host may end between the two calls
        if entry.claim():
            return
        holder = entry.holder()
    record = entry.record()
    advice = f"To end it: onnx-dl stop --host {entry.name}"
    # holder() is not called again below: it would release the locks that this process has by then.
    if record is None or record.pid != holder or record.managed:
        raise SupervisorError(f"A host {entry.name!r} runs already (pid {holder}). {advice}")
    if not entry.claim_next():
        raise SupervisorError(
            f"A host {entry.name!r} runs already (pid {holder}), and another onnx-dl supervise "
            "already waits for its end."
        )
    print(
        f"A host {entry.name!r} runs in the background (pid {holder}). This one waits until that host's "
        f"clients have gone. {advice}",
        flush=True,
    )
    entry.await_turn()
