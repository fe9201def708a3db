"""Decides when workers start and end.

Facts come in through ``on_*`` methods, with the monotonic time at which they happened.  Decisions go out as
lists of commands.  Each fact is handled by one part of the scheduler, and each piece of state has one owner:

=============================  ==================================================================
models, workers, their memory  :class:`~onnx_dl.supervisor.policy.fleet.Fleet`
settings, memory limits        :class:`~onnx_dl.supervisor.limits.Limits`
measured requirements          :class:`~onnx_dl.supervisor.policy.requirements.RequirementHistory`
loads that wait for memory     :class:`~onnx_dl.supervisor.policy.admission.Admission`
saves for the load cache       :class:`~onnx_dl.supervisor.policy.cache_saves.CacheSaves`
the host's own leases          :class:`~onnx_dl.supervisor.policy.leases.Leases`
numbers of events, reloads     :class:`~onnx_dl.supervisor.policy.announcements.Announcements`
how workers ended              :class:`~onnx_dl.supervisor.policy.outcomes.Outcomes`
the end of the host            :class:`~onnx_dl.supervisor.policy.shutdown.Shutdown`
open requests, commands        :class:`~onnx_dl.supervisor.policy.tickets.Outbox`
=============================  ==================================================================

Sockets, processes and clocks are :mod:`onnx_dl.supervisor.loop`'s.  The TTL itself runs in the worker, which
alone knows when it was last used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from onnx_dl.core.settings import Settings
from onnx_dl.core.spec import ModelSpec, Warmup
from onnx_dl.core.status import ModelStatus, Usage
from onnx_dl.core.terms import Terms
from onnx_dl.protocol import control as m
from onnx_dl.supervisor.policy import cache_saves
from onnx_dl.supervisor.policy.admission import Admission
from onnx_dl.supervisor.policy.announcements import Announcements
from onnx_dl.supervisor.policy.cache_saves import CacheSaves, SaveRequest
from onnx_dl.supervisor.policy.capacity import Capacity, Limits
from onnx_dl.supervisor.policy.client_requests import ClientRequests
from onnx_dl.supervisor.policy.commands import Command
from onnx_dl.supervisor.policy.exit_reasons import ExitStatus, wants_more_memory
from onnx_dl.supervisor.policy.fleet import Fleet
from onnx_dl.supervisor.policy.leases import Leases
from onnx_dl.supervisor.policy.load_failures import LoadFailures
from onnx_dl.supervisor.policy.measuring import LoadWeighing, Measurements, Sample
from onnx_dl.supervisor.policy.outcomes import Outcomes
from onnx_dl.supervisor.policy.recovery import Recovery
from onnx_dl.supervisor.policy.requirements import UNLIMITED, RequirementHistory, RequirementSource
from onnx_dl.supervisor.policy.shutdown import Shutdown
from onnx_dl.supervisor.policy.tickets import Outbox, Tickets
from onnx_dl.supervisor.policy.worker_control import WorkerControl
from onnx_dl.supervisor.policy.worker_exits import WorkerExits
from onnx_dl.supervisor.policy.worker_facts import WorkerFacts
from onnx_dl.transport.gauges import Reading


class Scheduler:
    """All models of one supervisor: builds the parts, and hands each fact to its part."""

    def __init__(
        self,
        settings: Settings,
        epoch: float = 0.0,
        memory: int | None = None,
        known: RequirementSource | None = None,
        is_saved: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """
        Args:
            epoch: is added to monotonic times to make Unix times.
            memory: bytes of the machine, which give the default limit.
            known: requirements that earlier hosts measured.
            is_saved: tells whether the load cache has an entry of this key.
        """
        self.fleet = fleet = Fleet()
        self.limits = limits = Limits(settings, memory)
        self.saves = saves = CacheSaves()
        self.outbox = outbox = Outbox(Tickets())
        self.outcomes = outcomes = Outcomes()
        history = RequirementHistory({} if known is None else known)
        capacity = Capacity(fleet, limits, saves, history, is_saved)
        measurements = Measurements(fleet, limits, capacity, history, epoch)
        self.weighing = LoadWeighing(fleet, limits, capacity, measurements, saves)
        self.admission = Admission(fleet, limits, capacity, self.weighing, saves)
        self.announcements = Announcements(fleet.ledger, epoch)
        self.control = control = WorkerControl(self.admission, self.announcements, outbox)
        self.shutdown = shutdown = Shutdown(fleet, limits, saves, control)
        self.leases = leases = Leases(fleet, control)
        self.facts = WorkerFacts(fleet, limits, outbox, control, leases, measurements)
        load_failures = LoadFailures(limits, control, leases, measurements)
        reaped = WorkerExits(fleet, outbox, control, measurements, load_failures, outcomes, shutdown)
        clients = ClientRequests(fleet, outbox, control, leases, outcomes, shutdown)
        recovery = Recovery(fleet, outbox, control, leases, outcomes, shutdown)
        self._route(clients, reaped, recovery)
        # Questions of the loop.
        self.pids, self.is_loaded = fleet.pids, fleet.is_loaded
        self.lingering_pids = fleet.ledger.lingering_pids
        self.know_gpus, self.in_use = limits.know_gpus, capacity.in_use
        self.to_weigh, self.wants_look = self.weighing.to_weigh, self.admission.wants_look

    def _route(self, clients: ClientRequests, reaped: WorkerExits, recovery: Recovery) -> None:
        """Gives each fact to the part that handles it."""
        facts, shutdown = self.facts, self.shutdown
        self.on_acquire, self.on_release = clients.on_acquire, clients.on_release
        self.on_withdraw, self.on_set_ttl = clients.on_withdraw, clients.on_set_ttl
        self.on_outdated, self.on_unload = clients.on_outdated, clients.on_unload
        self.on_ask_outcome, self.on_client_gone = clients.on_ask_outcome, clients.on_client_gone
        self.on_shutdown, self.on_stop = shutdown.on_shutdown, shutdown.on_stop
        self.on_abandoned = shutdown.on_abandoned
        self.on_spawned, self.on_started, self.on_ready = facts.on_spawned, facts.on_started, facts.on_ready
        self.on_load_failed, self.on_measured = facts.on_load_failed, facts.on_measured
        self.on_draining, self.on_drained = facts.on_draining, facts.on_drained
        self.to_check, self.on_checked = facts.to_check, facts.on_checked
        self.on_exited, self.on_spawn_failed = reaped.on_exited, reaped.on_spawn_failed
        self.on_broken, self.on_lost, self.on_stuck = recovery.on_broken, recovery.on_lost, recovery.on_stuck
        self.on_not_acquired, self.forget_client = recovery.on_not_acquired, recovery.forget_client

    # --- facts about the host -----------------------------------------------------------------------------

    def on_configured(
        self,
        settings: Settings,
        terms: Mapping[str, Terms],
        grouped: Mapping[str, Sequence[ModelSpec]],
        now: float,
    ) -> list[Command]:
        """The host's file was read.

        Args:
            terms: of the host for models that are loaded, by key of the model.
            grouped: the models that the file has in each group, by key of the group.
        """
        self.limits.follow(settings)
        self.leases.follow_file(terms, grouped, now)
        self.control.admit(now)
        self.admission.look_soon(now)
        return self.outbox.take()

    def on_saveable(self, ask: m.Saveable, now: float) -> list[Command]:
        """A model is worth saving for the load cache."""
        need = cache_saves.need(ask.nbytes)
        self.saves.request(SaveRequest(ask.key, ask.order, ask.blob, need, environment=ask.environment))
        self.control.admit(now)
        return self.outbox.take()

    def on_saver_ended(self, status: ExitStatus, now: float) -> list[Command]:
        """The saver and all processes that it started are reaped."""
        self.saves.ended(short=wants_more_memory(status))
        self.control.admit(now)
        return self.outbox.take()

    def on_weighed(self, worker_id: int, nbytes: int, now: float) -> list[Command]:
        """A load of :meth:`to_weigh` has so many bytes."""
        self.outbox.extend(self.weighing.weigh(worker_id, nbytes, now))
        return self.outbox.take()

    def on_tick(self, now: float, samples: Mapping[int, Sample] = MappingProxyType({})) -> list[Command]:
        """Time has passed.  ``samples``: of all workers, if :meth:`wants_look`."""
        self.facts.kill_overdue(now)
        self.control.carry_out(self.admission.refuse_late(now))
        if self.admission.wants_look(now):
            for worker_id, sample in samples.items():
                self.outbox.extend(self.facts.measurements.take_sample(worker_id, sample, now))
            self.control.carry_out(self.admission.look(samples, now))
        return self.outbox.take()

    # --- what is known ------------------------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """When :meth:`on_tick` has something to do; None: not before the next fact."""
        deadlines = (
            self.facts.next_deadline(),
            self.weighing.next_deadline(),
            self.admission.next_deadline(),
        )
        return min((at for at in deadlines if at is not None), default=None)

    def snapshot(
        self, now: float, readings: Mapping[int, Reading] = MappingProxyType({})
    ) -> list[ModelStatus]:
        """Every model that is loaded, held or failing.  ``readings``: pages of gauges by worker id."""
        return [
            model.status(self.fleet.ledger.of(model.worker.id) if model.worker else Usage(), now, readings)
            for model in self.fleet.models.values()
        ]

    @property
    def warmups(self) -> Mapping[str, dict[str, Warmup]]:
        """By key of the model: inputs of the run that a worker makes before it is ready."""
        return self.facts.warmups

    @warmups.setter
    def warmups(self, warmups: Mapping[str, dict[str, Warmup]]) -> None:
        self.facts.warmups = warmups

    @property
    def seq(self) -> int:
        return self.announcements.seq

    @property
    def closing(self) -> bool:
        return self.shutdown.closing

    @property
    def holds_any(self) -> bool:
        return self.leases.holds_any

    @property
    def finished(self) -> bool:
        return self.shutdown.finished

    @property
    def memory_limit(self) -> int | None:
        """Bytes that all workers together may take; None: there is no limit."""
        return None if self.limits.memory.ram == UNLIMITED else self.limits.memory.ram

    @property
    def gpu_memory_limit(self) -> int | None:
        """GPU bytes that all workers together may take; None: there is no limit."""
        return None if self.limits.memory.gpu == UNLIMITED else self.limits.memory.gpu
