"""Claims of proxies to a model in this process: which load each may use, and how they get one."""

from __future__ import annotations

import os
from collections.abc import Callable

from onnx_dl.client.acquisition import LOAD_MARGIN, Lease
from onnx_dl.concurrency import primitives
from onnx_dl.concurrency.deadline import Deadline, DeadlinePassed
from onnx_dl.concurrency.forking import Promise
from onnx_dl.core import load_output, model_files
from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import ModelDescription
from onnx_dl.errors import LoadTimeout, ProxyClosedError
from onnx_dl.inprocess.driver import CLIENT, Driver, ModelFiles, Reply
from onnx_dl.inprocess.held_blocks import HeldBlocks
from onnx_dl.inprocess.local_worker import BlobSources, LocalWorker
from onnx_dl.protocol import control as m
from onnx_dl.protocol import failures


class LocalClaims:
    """The present load of one model, and the leases on it.  Thread-safe, without a lock."""

    def __init__(self, spec: ModelSpec, blobs: BlobSources, driver: Callable[[], Driver]) -> None:
        """``blobs``: memory that it is loaded from; ``driver``: returns the host's present one."""
        self.spec = spec
        self.description: ModelDescription | None = None
        self.blobs = blobs
        self.driver = driver
        self.worker: LocalWorker | None = None
        """The load that was granted last."""
        self.blocks = HeldBlocks()

    def forget(self) -> None:
        """Drops the parent's load in a forked child, where its session has no threads."""
        self.worker, self.blocks = None, HeldBlocks()

    @property
    def usable(self) -> bool:
        return True

    @property
    def files(self) -> ModelFiles:
        """Source of a load."""
        own = model_files.bytes_of(self.spec.where("")) if self.spec.path else 0
        return ModelFiles(self.blobs, own + sum(map(self._blob_bytes, self.spec.blobs)))

    def _blob_bytes(self, name: str) -> int:

        make = self.blobs.get(name)
        if make is None:
            return 0
        fd = make()
        try:
            return os.fstat(fd).st_size
        finally:
            primitives.close(fd)

    def usable_by(self, lease: Lease) -> LocalWorker | None:
        worker = self.worker
        if worker is None or not worker.is_open:
            return None
        # Inside of a session() block one uses the load that it holds, also while that waits for the block.
        return worker if lease.granted is worker.granted or self.blocks else None

    def serves(self, lease: Lease) -> bool:
        return self.usable_by(lease) is not None

    def grant(self, lease: Lease, deadline: Deadline | None = None) -> m.Granted:
        """The grant of the lease.  Raises the reason if the model does not load."""
        worker = self.usable_by(lease) or self.acquire(lease, deadline)
        assert worker.granted is not None
        return worker.granted

    def leave_outdated(self, lease: Lease, granted: m.Granted, path: str) -> None:
        if lease.granted is granted:
            lease.granted = None
        outdated = m.Outdated(proxy=lease.id, worker_id=granted.worker_id, path=path)
        self.driver().tell(lambda scheduler, now: scheduler.on_outdated(CLIENT, outdated, now))

    def leave(self, lease: Lease, worker: LocalWorker) -> None:
        """Notes that a load takes no calls any more."""
        if lease.granted is worker.granted:
            lease.granted = None
        if self.worker is worker:
            self.worker = None

    def acquire(
        self, lease: Lease, deadline: Deadline | None = None, *, for_host: bool = False
    ) -> LocalWorker:
        while True:
            if lease.closed:
                raise ProxyClosedError(f"The proxy of {self.spec.name} is closed; make a new one.")
            driver = self.driver()
            granted = self._ask(driver, lease, deadline, for_host=for_host)
            if lease.closed:  # closed while it waited: it must not keep what it just got
                self.release(lease)
            worker = driver.workers.get(granted.worker_id)
            if worker is None or not worker.is_open:  # it has ended meanwhile
                continue
            worker.granted = worker.granted or granted
            if not for_host:
                lease.granted = worker.granted
            self.worker, self.description = worker, granted.description
            self.blocks.hold(worker)
            if not lease.has_load_output:
                lease.has_load_output = True
                load_output.repeat(granted.description.details.get("remarks"))
            return worker

    def _ask(self, driver: Driver, lease: Lease, deadline: Deadline | None, *, for_host: bool) -> m.Granted:
        """The scheduler's grant.  Raises what it denies the model with."""
        settings, nbytes = driver.settings, self.files.nbytes
        patience = Deadline(settings.load_timeout + settings.room_timeout + LOAD_MARGIN, outer=deadline)
        ticket, promise = driver.ask(
            lambda scheduler, ticket, now: scheduler.on_acquire(
                CLIENT,
                m.Acquire(
                    ticket=ticket,
                    proxy=lease.id,
                    spec=self.spec,
                    terms=lease.terms,
                    file_bytes=nbytes,
                    for_host=for_host,
                ),
                now,
            )
        )
        try:
            answer = await_reply(promise, patience, "the model to load")
        except BaseException as broken:  # Ctrl-C included
            driver.forget(ticket)
            keep = isinstance(broken, DeadlinePassed)
            withdrawal = m.Withdraw(ticket=ticket, proxy=lease.id, keep=keep)
            driver.tell(lambda scheduler, now: scheduler.on_withdraw(CLIENT, withdrawal, now))
            if keep and (deadline is None or not deadline.passed):
                raise LoadTimeout(
                    f"{self.spec.name} was not ready after {patience.timeout:g} seconds "
                    "(ONNX_DL_LOAD_TIMEOUT)."
                ) from None
            raise
        if isinstance(answer, m.Denied):
            raise failures.rebuild(answer.failure)
        assert isinstance(answer, m.Granted)
        return answer

    def set_ttl(self, lease: Lease) -> None:
        number, ttl = lease.id, lease.terms.ttl
        self.driver().tell(lambda scheduler, now: scheduler.on_set_ttl(CLIENT, number, ttl))

    def release(self, lease: Lease) -> None:
        lease.granted = None
        number = lease.id
        self.driver().tell(lambda scheduler, now: scheduler.on_release(CLIENT, number, now))


def await_reply(promise: Promise[Reply], deadline: Deadline | None, what: str) -> Reply:
    """The answer.  Raises DeadlinePassed if it was not there in time; ``what`` was waited for."""
    while True:
        try:
            return promise.result(None if deadline is None else deadline.step())
        except TimeoutError:
            if promise.done():
                return promise.result()
            assert deadline is not None
            deadline.check(what)
