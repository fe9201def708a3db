"""A worker as the scheduler knows it: what it is told, what it says, what it holds, how it ends."""

from __future__ import annotations

import collections
from typing import Any, Final

import msgspec

from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import ModelDescription, Usage
from onnx_dl.protocol import codec, control, failures
from onnx_dl.supervisor.policy.measuring import Sample
from onnx_dl.transport.gauges import Reading
from tests.support.builders import ready

MB: Final = 1 << 20
LOADS: Final = ("well", "badly", "for want of memory", "not at all", "without its entry", "partly")
"""How a load ends."""
SIZES: Final = {"a": 40 * MB, "b": 55 * MB, "c": 90 * MB, "d": 30 * MB, "group:g": 45 * MB}
GPU: Final = {"c": 900 * MB, "d": 1000 * MB}


class FakeWorker:
    """What it says is in flight, in order, until the world delivers it."""

    def __init__(self, worker_id: int, spec: ModelSpec) -> None:
        self.id = worker_id
        self.spec = spec
        self.pid: int | None = None
        self.said: collections.deque[Any] = collections.deque(["spawned", "started"])
        self.received: collections.deque[codec.Message] = collections.deque()
        self.state = "waiting"  # for Load; then loading, ready, failed, draining, drained, dead
        self.ttl: float | None = None
        self.reason = "ttl"
        self.began = False
        """Load has reached it."""
        self.hung = False
        """It does nothing any more; only SIGKILL ends it."""
        self.mapped = False
        self.nbytes = MB
        self.peak = MB
        self.runs = self.busy = self.exceeded = 0
        self.last_used = 0.0

    # --- what it hears ------------------------------------------------------------------------------------

    def handle(self, is_idle: bool) -> None:
        """Takes in one order, if there is one."""
        if self.hung or self.state == "dead" or not self.received:
            return
        match self.received.popleft():
            case control.Load(ttl=ttl, mapped=mapped, early=early):
                assert self.state == "waiting", "Load comes once, and first"
                self.state, self.ttl, self.mapped, self.began = "loading", ttl, mapped, True
                if early:
                    self.said.append("loading")
            case control.Prepare():
                assert self.state == "waiting" and self.spec.key in GPU, "Prepare comes before Load"
                self.said.append("prepared")
            case control.Retime(ttl=ttl):
                assert self.state not in ("waiting", "loading", "failed"), "Retime comes to a loaded model"
                self.ttl = ttl
            case control.DrainIfIdle():
                if is_idle and not self.busy:
                    self.drain("ttl")
            case control.Drain():
                if self.state == "ready":
                    self.state = "draining"
            case control.Exit():
                assert self.state in ("failed", "drained"), "Exit comes to those who are done"
                self.die(0)

    # --- what it does -------------------------------------------------------------------------------------

    def load(self, how: str, part: float) -> None:
        """A load ends, or has come so far that it holds this part of what it will."""
        if self.state != "loading" or self.hung:
            return
        if how == "not at all":
            self.grow(int(SIZES[self.spec.key] * 1.3 * part))
            return
        error = {"badly": ValueError("no model"), "for want of memory": MemoryError()}.get(how)
        if error is not None or (how == "without its entry" and self.mapped):
            self.state = "failed"
            failure = failures.describe(error or ValueError("no entry"))
            self.said.append(control.WorkerFailed(worker_id=self.id, failure=failure, unsaved=error is None))
        else:
            self.state = "ready"
            self.grow(int(SIZES[self.spec.key] * (0.6 if self.mapped else 1.3)))
            self.nbytes = SIZES[self.spec.key] // (2 if self.mapped else 1)
            self.said.append(self._ready(how == "partly"))

    def _ready(self, partly: bool) -> control.WorkerReady:
        keys = [member.key for member in self.spec.members]
        failed = keys[:1] if partly else []
        failure = msgspec.to_builtins(failures.describe(ValueError("not a model")))
        description = ModelDescription(
            members={key: ModelDescription() for key in keys if key not in failed},
            failed=dict.fromkeys(failed, failure),
        )
        entry = "" if keys else self.spec.key * 8
        return msgspec.structs.replace(
            ready(self.id),
            description=description,
            entry=entry if set(entry) <= set("abcdef") else "",
            mapped=self.mapped,
        )

    def grow(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.peak = max(self.peak, nbytes)

    def call(self, now: float, extra: int) -> None:
        """A call begins, and needs so many bytes more."""
        if self.state == "ready" and not self.hung:
            self.busy, self.last_used, self.runs = 1, now, self.runs + 1
            self.peak = max(self.peak, self.nbytes + extra)

    def drain(self, reason: str) -> None:
        if self.state == "ready" and not self.hung:
            self.state = "draining"
            self.said.append(("draining", reason))

    def finish(self) -> None:
        """What it was at has ended."""
        if self.hung:
            return
        self.busy = 0
        if self.state == "draining":
            self.state = "drained"
            self.said.append("drained")

    def die(self, status: int) -> None:
        if self.state != "dead":
            self.state = "dead"
            self.said.append(("exited", status))

    def lose_words(self, count: int) -> None:
        """A crash takes along what was not sent."""
        while self.state != "dead" and count and self.said and self.said[-1] != "spawned":
            self.said.pop()
            count -= 1

    # --- what is seen of it -------------------------------------------------------------------------------

    def usage(self) -> Usage:
        if self.state == "dead" or self.pid is None:
            return Usage()
        gpu = GPU.get(self.spec.key) if self.state not in ("waiting", "loading") else None
        return Usage(rss=self.nbytes + MB, private=self.nbytes // 2, gpu=gpu, pss=self.nbytes, peak=self.peak)

    def reading(self) -> Reading:
        return Reading(self.runs, self.busy, self.last_used, exceeded=self.exceeded)

    def seen(self, fresh: bool) -> Sample:
        return Sample(self.usage() if fresh or self.busy else None, self.reading())
