"""``onnx-dl supervise``: a shared host in the foreground, for a terminal or a service manager."""

from __future__ import annotations

import os
import secrets
import sys

import msgspec

from onnx_dl import config
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
    given = {field: value for field, value in settings.items() if value is not None}
    orders = Orders(
        address=config.fresh_address("host"),
        secret=secrets.token_hex(16),
        sys_path=[os.path.abspath(entry) for entry in sys.path],
        settings=msgspec.structs.replace(config.settings(), **given),
        host=name,
        firm=list(given),
        foreground=True,
    )
    if not serve(orders):
        raise SupervisorError(
            f"A host {name!r} runs already (pid {Place(name).holder()}). onnx-dl stop --host {name} ends it."
        )
