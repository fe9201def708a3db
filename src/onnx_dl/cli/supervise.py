"""``onnx-dl supervise``: a shared host in the foreground, for a terminal or a service manager."""

from __future__ import annotations

import secrets

import msgspec

from onnx_dl.core import settings as settings_module
from onnx_dl.errors import SupervisorError
from onnx_dl.protocol.codec import PROTOCOL_VERSION
from onnx_dl.supervisor.main import Orders, serve
from onnx_dl.system import platform, process_setup
from onnx_dl.transport import addresses
from onnx_dl.transport.rendezvous import USUAL, Place


def supervise(name: str = USUAL, **settings: str | None) -> None:
    """Runs the host of this name until SIGTERM or Ctrl-C; what happens to models is printed on stdout.

    Where an application has started the host of this name in the background, this waits until that one has
    gone, which it does when its clients have.  A host of another version that was started before ends
    likewise; for that this does not wait.

    ``settings``: fields of :class:`~onnx_dl.core.settings.Settings` in place of what the environment says.

    Raises:
        ValueError: (as :class:`~onnx_dl.errors.ConfigError`) a name or setting cannot be.
        SupervisorError: a host of this name runs that is kept in the foreground, or another process waits
            to be the next one.
    """
    platform.check_platform()
    process_setup.make_own()
    given = {field: value for field, value in settings.items() if value is not None}
    orders = Orders(
        address=addresses.fresh_address("host"),
        secret=secrets.token_hex(16),
        settings=msgspec.structs.replace(settings_module.settings(), **given),
        protocol=PROTOCOL_VERSION,
        host=name,
        firm=list(given),
        foreground=True,
    )
    place = Place(name)
    _take(place)
    serve(orders, place)


def _take(place: Place) -> None:
    """Makes this process the host, at once or after the one in the background."""
    holder = None
    while holder is None:  # it may end between the two questions
        if place.claim():
            return
        holder = place.holder()
    record = place.record()
    # Not asked again below: a process that looks at a lock file loses the locks that it has in it.
    if record is None or record.pid != holder or record.kept:
        raise SupervisorError(f"A host {place.name!r} runs already (pid {holder}). {_stop(place)}")
    if not place.line_up():
        raise SupervisorError(
            f"A host {place.name!r} runs already (pid {holder}), and another onnx-dl supervise waits for its "
            "end."
        )
    print(
        f"host {place.name!r} runs in the background, pid {holder}; this one follows when its clients have "
        f"gone. {_stop(place)}",
        flush=True,
    )
    place.await_turn()


def _stop(place: Place) -> str:
    return f"onnx-dl stop --host {place.name} ends it."
