"""Records of models and their workers.  :class:`~onnx_dl.supervisor.policy.fleet.Fleet` owns them."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Final

import msgspec

from onnx_dl.core.environment import ThreadAttributes
from onnx_dl.core.lifecycle import LifecycleEvent, ModelState, transition
from onnx_dl.core.parsing import KEEP
from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import ModelStatus, Usage
from onnx_dl.core.terms import Terms
from onnx_dl.protocol import control
from onnx_dl.protocol.failures import Failure
from onnx_dl.supervisor.policy import requirements
from onnx_dl.supervisor.policy.commands import KillWorker
from onnx_dl.supervisor.policy.eviction import LoadPlan
from onnx_dl.supervisor.policy.memory_amount import NOTHING, MemoryAmount
from onnx_dl.transport.gauges import Reading

LeaseId = tuple[bytes, int]
"""Client and number of its proxy."""
HOST: Final = b"host"
"""Stands for the host itself where a client is named.  No client has a name of four bytes."""
HOST_LEASE: Final[LeaseId] = (HOST, 0)
"""The lease by which the host itself holds a model."""

_NO_READING: Final = Reading()


@dataclasses.dataclass
class WorkerRecord:
    """One spawn.  Times are monotonic seconds."""

    id: int
    started: float
    pid: int | None = None
    listens: bool = False
    """WorkerStarted has arrived."""
    ready: control.WorkerReady | None = None
    ready_at: float | None = None
    sent_ttl: float = KEEP
    """The TTL that the worker was sent last."""
    failure: Failure | None = None
    """Reason of its failure: as it said itself, or why it was ended."""
    drained: bool = False
    """All calls that it began are finished, and it begins no other."""
    kill_at: float | None = None
    check_at: float | None = None
    """While draining: when to check whether a call runs."""
    idle_since: float | None = None
    """While draining: since when no call was seen."""
    killed: bool = False
    """The supervisor killed it.  Otherwise its death is a crash."""
    reason: str = "crash"
    peak: MemoryAmount = NOTHING
    """The most measured since its peak was last reset."""
    marked_at: float = 0.0
    """Time when its peak was last reset."""
    marked_runs: int = 0
    """Number of its runs at that time."""
    outdated: bool = False
    """A file has changed since it was read, and that was announced."""
    exceeded: int = 0
    """Bytes held when it ended itself for exceeding ``max_memory_hard``."""
    plan: LoadPlan = dataclasses.field(default_factory=LoadPlan)
    weigh_at: float | None = None
    """Time to measure its load; None: there is no limit, or the load is over."""
    outgrew: bool = False
    """Its load was ended because it took more memory than there was."""
    waits: bool = False
    """True if it has started early: its load is still pending."""
    early: bool = False
    """True if it has started early, and its load has not begun in it: its end is not the load's failure."""
    prepares: bool = False
    """True if it makes a context on its GPU until then."""
    prepared: bool = False
    """True if it has made that context."""
    unsaved: bool = False
    """True if it was to load from the load cache, which no longer has its model."""

    @property
    def is_ending(self) -> bool:
        """True if it was told to leave or was killed.  Its memory may be gone before it is reaped, so later
        measurements do not count."""
        return self.killed or self.drained or self.failure is not None

    @property
    def is_idle_early(self) -> bool:
        """True if it has started early, has done all that it can, and waits for memory."""
        return self.waits and (self.prepared if self.prepares else self.listens)

    def kill(self) -> KillWorker:
        """Notes that the supervisor ends it, and returns the command."""
        self.killed = True
        return KillWorker(self.id)


@dataclasses.dataclass
class ModelRecord:
    """One model, or one group, and its present worker, if any."""

    key: str
    spec: ModelSpec
    state: ModelState = ModelState.UNLOADED
    worker: WorkerRecord | None = None
    leases: dict[LeaseId, Terms] = dataclasses.field(default_factory=dict)
    """Terms of each proxy that was granted the present worker."""
    waiters: list[tuple[bytes, control.Acquire]] = dataclasses.field(default_factory=list)
    unloaders: list[tuple[bytes, int]] = dataclasses.field(default_factory=list)
    """Client and ticket of each Unload that waits for the worker's end."""
    failures: int = 0
    """Failures in a row."""
    retry_at: float = 0.0
    last_failure: Failure | None = None
    loads: int = 0
    wanted_at: float = 0.0
    """Time when the load that is pending or under way was first requested."""
    at_least: MemoryAmount = NOTHING
    """Least memory for the next load, after one that ran out of memory."""
    second_try: bool = False
    """True while such a load is being repeated."""
    thread_attributes: ThreadAttributes | None = None
    """Attributes of the thread that asked last.  The next worker gets them."""
    named: dict[bytes, dict[str, ModelSpec]] = dataclasses.field(default_factory=dict)
    """Models of a group by key, as each client, or the host, last named them."""
    history: collections.deque[str] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=16))

    def step(self, event: LifecycleEvent, now: float) -> None:
        """Moves to the next state by the table of states.

        Raises:
            InvalidTransition: the table has no such cell.
        """
        before = self.state
        self.state = transition(before, event, self.history)
        self.history.append(f"{now:.3f} {event} {before}->{self.state}")

    @property
    def ttl(self) -> float:
        """The longest TTL of all leases and waiters."""
        return _longest([terms.ttl for terms in (*self.leases.values(), *(a.terms for _, a in self.waiters))])

    @property
    def priority(self) -> int:
        """The highest priority of all leases."""
        return max((terms.priority for terms in self.leases.values()), default=0)

    @property
    def is_pinned(self) -> bool:
        """True if a lease forbids eviction."""
        return any(terms.pin for terms in self.leases.values())

    def take_waiters(
        self, which: Callable[[bytes, control.Acquire], bool] = lambda client, ask: True
    ) -> list[tuple[bytes, control.Acquire]]:
        """Removes and returns the waiters for which ``which`` is true."""
        taken = [waiter for waiter in self.waiters if which(*waiter)]
        self.waiters = [waiter for waiter in self.waiters if waiter not in taken]
        return taken

    def with_retry(self, failure: Failure, now: float) -> Failure:
        """The failure together with the seconds until the model may be loaded again."""
        details = failure.details | {"retry_after": max(0.0, self.retry_at - now)}
        return msgspec.structs.replace(failure, details=details)

    def forget_client(self, client: bytes) -> bool:
        """Removes all that the client has here.  True if it held or waited for the model."""
        held = [lease for lease in self.leases if lease[0] == client]
        for lease in held:
            del self.leases[lease]
        self.unloaders = [unloader for unloader in self.unloaders if unloader[0] != client]
        self.named.pop(client, None)
        return bool(self.take_waiters(lambda who, _: who == client) or held)

    def join(self, client: bytes, ask: control.Acquire, others: Iterable[ModelSpec] = ()) -> None:
        """Notes what a client asks for: the model, the client's other models of the group, and ``others``,
        which the host's file names."""
        self.thread_attributes = ask.thread_attributes
        if ask.spec.group is None:
            return
        of_host = self.named.setdefault(HOST, {})
        of_host.update({spec.key: spec for spec in others})
        if ask.for_host:
            of_host[ask.spec.key] = ask.spec
        if client != HOST:
            self.named[client] = {spec.key: spec for spec in (ask.spec, *ask.companions)}

    def follow_file(self, lost: Container[str], others: Iterable[ModelSpec]) -> None:
        """Updates the host's models of the group after its file changed: without the ``lost`` ones, with
        those of ``others`` that are in the group already."""
        of_host = self.named.get(HOST, {})
        found = {spec.key: spec for spec in others if spec.key in self.members}
        of_host = {key: spec for key, spec in of_host.items() if key not in lost} | found
        if of_host or HOST in self.named:
            self.named[HOST] = of_host

    @property
    def members(self) -> dict[str, ModelSpec]:
        """Models of a group, by key, that a client named or waits for."""
        waiting = {ask.spec.key: ask.spec for _, ask in self.waiters if ask.spec.group is not None}
        return {key: spec for models in (*self.named.values(), waiting) for key, spec in models.items()}

    @property
    def parts(self) -> list[str]:
        """Keys of the members of a group, or the model's own key."""
        return list(self.members) or [self.key]

    def host_terms(self, terms: Mapping[str, Terms]) -> Terms | None:
        """Terms of the host for all its members together; None: the host has none for any of them."""
        own = [terms[key] for key in self.parts if key in terms]
        if not own:
            return None
        return Terms(
            ttl=_longest([each.ttl for each in own]),
            pin=any(each.pin for each in own),
            priority=max(each.priority for each in own),
        )

    def serves(self, ask: control.Acquire) -> bool:
        """True if the present or last worker was started with the model that is asked for."""
        return not self.spec.members or any(member.key == ask.spec.key for member in self.spec.members)

    @property
    def file_bytes(self) -> int:
        """Size of the model's files, as far as a waiter told it."""
        return max((ask.file_bytes for _, ask in self.waiters), default=0)

    @property
    def next_requirement_key(self) -> str:
        """Key under which the memory figures of the next worker are stored."""
        return requirements.requirement_key(self.key, self.members)

    @property
    def requirement_key(self) -> str:
        """Key under which the present worker's memory figures are stored.  A group may have new members since
        it was loaded."""
        return requirements.requirement_key(self.key, (member.key for member in self.spec.members))

    def status(self, usage: Usage, now: float, readings: Mapping[int, Reading]) -> ModelStatus:
        """One line of a snapshot.  ``usage``: of the worker; ``readings``: pages of gauges by worker id."""
        worker = self.worker
        reading = readings.get(worker.id, _NO_READING) if worker else _NO_READING
        failed = worker.ready.description.failed if worker and worker.ready else {}
        used = reading.last_used > 0 and not reading.busy
        return ModelStatus(
            model=self.spec.name,
            key=self.key,
            state=self.state,
            worker_id=worker.id if worker else None,
            pid=worker.pid if worker else None,
            leases=len(self.leases),
            ttl=worker.sent_ttl if worker else None,
            usage=usage,
            loads=self.loads,
            failures=self.failures,
            retry_after=max(0.0, self.retry_at - now),
            pinned=self.is_pinned,
            priority=self.priority,
            busy=reading.busy,
            idle=max(0.0, now - reading.last_used) if used else None,
            runs=reading.runs,
            p50=reading.quantile(0.5),
            members={member.key: member.name for member in self.spec.members if member.key not in failed},
            isolated=self.spec.isolation,
        )


def _longest(ttls: list[float]) -> float:
    """The longest TTL.  KEEP is longer than any; so is no TTL at all."""
    return KEEP if KEEP in ttls else max(ttls, default=KEEP)
