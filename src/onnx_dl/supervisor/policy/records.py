"""What the scheduler knows of each model and each worker.  Records only; the scheduler alone changes them."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Container, Iterable, Mapping
from typing import Final, NamedTuple

from onnx_dl.core.lifecycle import LifecycleEvent, ModelState, transition
from onnx_dl.core.parsing import KEEP
from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import ModelStatus, Usage
from onnx_dl.core.thread_attributes import Standing
from onnx_dl.protocol import control
from onnx_dl.protocol.failures import Failure
from onnx_dl.supervisor.policy.eviction import Plan
from onnx_dl.supervisor.policy.ledger import Ledger
from onnx_dl.supervisor.policy.requirements import NOTHING, Bytes
from onnx_dl.transport.gauges import Reading

HOST: Final = b"host"
"""Who holds a model that stays on behalf of nobody; no client has a name of four bytes."""

_NOTHING: Final = Reading()


class Terms(NamedTuple):
    """On which the host itself holds a model."""

    ttl: float
    pin: bool
    priority: int


@dataclasses.dataclass
class Worker:
    """One spawn.  Times are monotonic seconds."""

    id: int
    started: float
    pid: int | None = None
    listens: bool = False
    """It has said that it has started."""
    ready: control.WorkerReady | None = None
    ready_at: float | None = None
    told_ttl: float = KEEP
    failure: Failure | None = None
    """Why it failed, where it could say so itself or was ended for it."""
    drained: bool = False
    """It finished all calls that it began, and began no other."""
    kill_at: float | None = None
    check_at: float | None = None
    """While it drains: when to look at whether it does anything."""
    idle_since: float | None = None
    """While it drains: since when it was seen to do nothing."""
    killed: bool = False
    """The supervisor ended it; another death is a crash, whatever it was about to do."""
    reason: str = "crash"
    peak: Bytes = NOTHING
    """The most that it was measured to take since its mark was set back."""
    marked_at: float = 0.0
    marked_runs: int = 0
    """The runs that it had made when that was."""
    outdated: bool = False
    """A proxy found that a file has changed since it was read, and that was told."""
    exceeded: int = 0
    """Bytes that it had when it ended itself because it may not have so many."""
    plan: Plan = dataclasses.field(default_factory=Plan)
    """The terms of its load."""
    weigh_at: float | None = None
    """When to look at what its load takes; None: there is no limit, or it has loaded."""
    outgrew: bool = False
    """Its load was ended because it took more memory than there was."""
    unsaved: bool = False
    """It was to load from the load cache, where its model is no more."""

    @property
    def is_ending(self) -> bool:
        """Whether it was told to leave or ended: its memory may be gone before it is reaped, so what is
        measured from then on does not count."""
        return self.killed or self.drained or self.failure is not None


@dataclasses.dataclass
class Model:
    """One model and its present worker, if any."""

    key: str
    spec: ModelSpec
    state: ModelState = ModelState.UNLOADED
    worker: Worker | None = None
    leases: dict[tuple[bytes, int], float] = dataclasses.field(default_factory=dict)
    """The TTL of each proxy that has used the present worker, by client and proxy."""
    pins: set[tuple[bytes, int]] = dataclasses.field(default_factory=set)
    """The proxies among those that want the model to stay."""
    priorities: dict[tuple[bytes, int], int] = dataclasses.field(default_factory=dict)
    waiters: list[tuple[bytes, control.Acquire]] = dataclasses.field(default_factory=list)
    unloaders: list[tuple[bytes, int]] = dataclasses.field(default_factory=list)
    failures: int = 0
    """In a row."""
    retry_at: float = 0.0
    last_failure: Failure | None = None
    loads: int = 0
    wished_at: float = 0.0
    """Since when somebody has waited for the load that is wished for or under way."""
    at_least: Bytes = NOTHING
    """What a load needs that has failed for lack of memory; nothing if it has not."""
    second_try: bool = False
    """Such a load is made once more."""
    standing: Standing | None = None
    """Of the thread that asked last; its next worker has it."""
    named: dict[bytes, dict[str, ModelSpec]] = dataclasses.field(default_factory=dict)
    """Of a group: by client, and the host, the models that it had in it when it last asked, by key."""
    history: collections.deque[str] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=16))

    def step(self, event: LifecycleEvent, now: float) -> None:
        """Goes where the table says.

        Raises:
            InvalidTransition: the table has no such cell.
        """
        before = self.state
        self.state = transition(before, event, self.history)
        self.history.append(f"{now:.3f} {event} {before}->{self.state}")

    def ttl(self) -> float:
        """The longest of the TTLs of those who hold or wait for the model; KEEP is longer than any."""
        ttls = [*self.leases.values(), *(ask.ttl for _, ask in self.waiters)]
        return KEEP if KEEP in ttls else max(ttls, default=KEEP)

    def priority(self) -> int:
        """The highest of those who hold the model."""
        return max(self.priorities.values(), default=0)

    def join(self, client: bytes, ask: control.Acquire, others: Iterable[ModelSpec] = ()) -> None:
        """The model asked for, those that the client has beside it, and others that are the host's belong to
        this group from now on.  The next worker has the standing of who asked last."""
        self.standing = ask.standing
        if ask.spec.group is None:
            return
        hosts = self.named.setdefault(HOST, {})
        hosts.update({spec.key: spec for spec in others})
        if ask.for_host:
            hosts[ask.spec.key] = ask.spec
        if client != HOST:
            self.named[client] = {spec.key: spec for spec in (ask.spec, *ask.companions)}

    def follow(self, lost: Container[str], others: Iterable[ModelSpec]) -> None:
        """The host's file has changed: of this group, the host has none of the models any more that it lost,
        and, of ``others`` that the file names, those that are in the group already."""
        hosts = self.named.get(HOST, {})
        found = {spec.key: spec for spec in others if spec.key in self.members}
        hosts = {key: spec for key, spec in hosts.items() if key not in lost} | found
        if hosts or HOST in self.named:
            self.named[HOST] = hosts

    @property
    def members(self) -> dict[str, ModelSpec]:
        """Of a group: the models that somebody has in it or waits for, by key."""
        waiting = {ask.spec.key: ask.spec for _, ask in self.waiters if ask.spec.group is not None}
        return {key: spec for models in (*self.named.values(), waiting) for key, spec in models.items()}

    @property
    def parts(self) -> list[str]:
        """The keys of the models that it is made of."""
        return list(self.members) or [self.key]

    def own_terms(self, terms: Mapping[str, Terms]) -> Terms | None:
        """On which the host holds it, because it has terms for some of its models; None: it does not."""
        own = [terms[key] for key in self.parts if key in terms]
        if not own:
            return None
        longest = KEEP if any(each.ttl == KEEP for each in own) else max(each.ttl for each in own)
        return Terms(longest, any(each.pin for each in own), max(each.priority for each in own))

    def serves(self, ask: control.Acquire) -> bool:
        """Whether the present or last worker was started with this model among others, or for it alone."""
        return not self.spec.members or any(member.key == ask.spec.key for member in self.spec.members)

    def grant(self, lease: tuple[bytes, int], ttl: float, pin: bool, priority: int) -> None:
        """A proxy holds the model on these terms."""
        self.leases[lease] = ttl
        self.priorities[lease] = priority
        if pin:
            self.pins.add(lease)
        else:
            self.pins.discard(lease)

    def let_go(self, lease: tuple[bytes, int]) -> bool:
        """A proxy holds the model no more; whether it did."""
        self.pins.discard(lease)
        self.priorities.pop(lease, None)
        return self.leases.pop(lease, None) is not None

    def status(self, ledger: Ledger, now: float, readings: Mapping[int, Reading]) -> ModelStatus:
        """One line of a snapshot."""
        worker = self.worker
        reading = readings.get(worker.id, _NOTHING) if worker else _NOTHING
        failed = worker.ready.description.failed if worker and worker.ready else {}
        used = reading.last_used > 0 and not reading.busy
        return ModelStatus(
            model=self.spec.name,
            key=self.key,
            state=self.state,
            worker_id=worker.id if worker else None,
            pid=worker.pid if worker else None,
            leases=len(self.leases),
            ttl=worker.told_ttl if worker else None,
            usage=ledger.of(worker.id) if worker else Usage(),
            loads=self.loads,
            failures=self.failures,
            retry_after=max(0.0, self.retry_at - now),
            pinned=bool(self.pins),
            priority=self.priority(),
            busy=reading.busy,
            idle=max(0.0, now - reading.last_used) if used else None,
            runs=reading.runs,
            p50=reading.quantile(0.5),
            members={member.key: member.name for member in self.spec.members if member.key not in failed},
        )
