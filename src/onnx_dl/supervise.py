"""``onnx-dl supervise``: a shared host in the foreground, for a terminal or a service manager."""

from __future__ import annotations

import secrets

import msgspec

from onnx_dl import config, surroundings
from onnx_dl.errors import SupervisorError
from onnx_dl.rendezvous import USUAL, Place
from onnx_dl.supervisor.main import Orders, serve


def supervise(name: str = USUAL, **settings: str | None) -> None:
    """Runs the host of this name until SIGTERM or Ctrl-C; what happens to models is printed on stdout.

    ``settings``: fields of :class:`~onnx_dl.config.Settings` in place of what the environment says.

    Raises:
        ValueError: (as :class:`~onnx_dl.errors.ConfigError`) a name or setting cannot be.
        SupervisorError: a host of this name runs.
    """
    config.check_platform()
    surroundings.make_own()
    given = {field: value for field, value in settings.items() if value is not None}
    orders = Orders(
        address=config.fresh_address("host"),
        secret=secrets.token_hex(16),
        sys_path=surroundings.search_path(),
        settings=msgspec.structs.replace(config.settings(), **given),
        host=name,
        firm=list(given),
        foreground=True,
    )
    if not serve(orders):
        raise SupervisorError(
            f"A host {name!r} runs already (pid {Place(name).holder()}). onnx-dl stop --host {name} ends it."
        )
