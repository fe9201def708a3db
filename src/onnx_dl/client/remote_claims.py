"""Claims of proxies to a model in a worker process, as its supervisor is told of them."""

from __future__ import annotations

from onnx_dl.client.acquisition import Acquisition, Lease
from onnx_dl.client.connection import Connection
from onnx_dl.client.current_worker import CurrentWorker
from onnx_dl.protocol import control


class RemoteClaims:
    """The host of one model, its present worker, and the leases on it."""

    def __init__(self, acquisition: Acquisition, worker: CurrentWorker) -> None:
        self.worker = worker
        self._acquisition = acquisition

    @property
    def connection(self) -> Connection:
        """The connection to the present host."""
        return self._acquisition.connection

    @property
    def usable(self) -> bool:
        """True if the connection to the host is there."""
        return self._acquisition.connection.usable

    def leave_outdated(self, lease: Lease, granted: control.Granted, path: str) -> None:
        """Gives up a worker that has read other contents of this file than are there now."""
        self.worker.leave_outdated(lease, granted, path)

    def set_ttl(self, lease: Lease) -> None:
        """Tells the supervisor the TTL of the lease."""
        lease.send_ttl(self.connection)

    def release(self, lease: Lease) -> None:
        """Gives up the worker until the next use."""
        lease.release(self.connection)
