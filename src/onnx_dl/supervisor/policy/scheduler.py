"""Decides when workers start and end.

Facts come in through ``on_*`` methods, with the monotonic time at which they happened.  Decisions go out as
lists of commands.  Each fact is handled by one part of the scheduler, and each piece of state has one owner:

=============================  ==================================================================
models, workers, their memory  :class:`~onnx_dl.supervisor.policy.fleet.Fleet`
settings, memory limits        :class:`~onnx_dl.supervisor.policy.capacity.Limits`
measured requirements          :class:`~onnx_dl.supervisor.policy.requirements.RequirementHistory`
loads that wait for memory     :class:`~onnx_dl.supervisor.policy.admission.Admission`
saves for the load cache       :class:`~onnx_dl.supervisor.policy.cache_saves.CacheSaves`
the host's own leases          :class:`~onnx_dl.supervisor.policy.leases.Leases`
proxies that are not closed    :class:`~onnx_dl.supervisor.policy.live_proxies.LiveProxies`
numbers of events, reloads     :class:`~onnx_dl.supervisor.policy.announcements.Announcements`
how workers ended              :class:`~onnx_dl.supervisor.policy.outcomes.Outcomes`
the end of the host            :class:`~onnx_dl.supervisor.policy.shutdown.Shutdown`
open requests, commands        :class:`~onnx_dl.supervisor.policy.orders.Outbox`
=============================  ==================================================================

Sockets, processes and clocks are :mod:`onnx_dl.supervisor.loop`'s.  The TTL itself runs in the worker, which
alone knows when it was last used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import ParamSpec

from onnx_dl.core.settings import Settings
from onnx_dl.core.spec import ModelSpec
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
from onnx_dl.supervisor.policy.early_starts import EarlyStarts
from onnx_dl.supervisor.policy.fleet import Fleet
from onnx_dl.supervisor.policy.leases import Leases
from onnx_dl.supervisor.policy.live_proxies import LiveProxies
from onnx_dl.supervisor.policy.measuring import LoadWeighing, Measurements, Sample
from onnx_dl.supervisor.policy.memory_amount import UNLIMITED
from onnx_dl.supervisor.policy.orders import Outbox, WorkerOrders
from onnx_dl.supervisor.policy.outcomes import ExitStatus, Outcomes, wants_more_memory
from onnx_dl.supervisor.policy.requirements import Requirement, RequirementHistory
from onnx_dl.supervisor.policy.shutdown import ShutdownState
from onnx_dl.supervisor.policy.worker_exits import WorkerExits
from onnx_dl.supervisor.policy.worker_facts import WorkerFacts
from onnx_dl.transport.gauges import Reading

_P = ParamSpec("_P")


class Scheduler:
    """All models of one supervisor: builds the parts, and hands each fact to its part."""

    def __init__(
        self,
        settings: Settings,
        epoch: float = 0.0,
        memory: int | None = None,
        known: Callable[[str], Requirement | None] = lambda _: None,
        is_saved: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """
        Args:
            epoch: is added to monotonic times to make Unix times.
            memory: bytes of the machine, which give the default limit.
            known: returns what earlier hosts measured of a model, by its key.
            is_saved: tells whether the load cache has an entry of this key.
        """
        self.fleet = fleet = Fleet()
        self.limits = limits = Limits(settings, memory)
        self.saves = saves = CacheSaves()
        self.outbox = outbox = Outbox()
        self.outcomes = outcomes = Outcomes(outbox)
        history = RequirementHistory(known)
        capacity = Capacity(fleet, limits, saves, history, is_saved)
        measurements = Measurements(fleet, limits, capacity, history, epoch)
        self.weighing = LoadWeighing(fleet, limits, capacity, measurements, saves)
        early = EarlyStarts(fleet, limits, capacity)
        self.admission = Admission(fleet, limits, capacity, self.weighing, saves, early)
        self.announcements = Announcements(fleet.ledger, epoch)
        self.orders = orders = WorkerOrders(self.admission, self.announcements, outbox)
        self.shutdown = shutdown = ShutdownState(fleet, limits, saves, orders)
        self.leases = leases = Leases(fleet, orders)
        self.facts = WorkerFacts(fleet, limits, orders, leases, measurements)
        exits = WorkerExits(fleet, limits, orders, leases, measurements, outcomes, shutdown)
        self._proxies = LiveProxies()
        clients = ClientRequests(fleet, orders, leases, outcomes, shutdown, self._proxies)
        self._route(clients, exits)
        # Questions of the loop.
        self.pids, self.preparing, self.is_loaded = fleet.pids, fleet.preparing, fleet.is_loaded
        self.lingering_pids, self.to_check = fleet.ledger.lingering_pids, self.facts.to_check
        self.know_gpus, self.in_use = limits.know_gpus, capacity.in_use
        self.to_weigh, self.wants_look = self.weighing.to_weigh, self.admission.wants_look

    def _route(self, clients: ClientRequests, exits: WorkerExits) -> None:
        """Gives each fact to the part that handles it."""
        fact, facts, orders, shutdown = self._fact, self.facts, self.orders, self.shutdown
        self.on_acquire, self.on_not_acquired = fact(clients.on_acquire), fact(clients.on_not_acquired)
        self.on_release, self.on_withdraw = fact(clients.on_release), fact(clients.on_withdraw)
        self.on_set_ttl, self.on_outdated = fact(clients.on_set_ttl), fact(clients.on_outdated)
        self.on_unload, self.on_ask_outcome = fact(clients.on_unload), fact(clients.on_ask_outcome)
        self.on_client_gone, self.forget_client = fact(clients.on_client_gone), fact(clients.forget_client)
        self.on_shutdown, self.on_stop = fact(shutdown.on_shutdown), fact(shutdown.on_stop)
        self.on_abandoned, self.on_stuck = fact(shutdown.on_abandoned), fact(orders.on_stuck)
        self.on_spawned, self.on_started = fact(facts.on_spawned), fact(facts.on_started)
        self.on_prepared, self.on_loading = fact(facts.on_prepared), fact(facts.on_loading)
        self.on_ready, self.on_load_failed = fact(facts.on_ready), fact(facts.on_load_failed)
        self.on_draining, self.on_drained = fact(facts.on_draining), fact(facts.on_drained)
        self.on_measured, self.on_checked = fact(facts.on_measured), fact(facts.on_checked)
        self.on_exited, self.on_spawn_failed = fact(exits.on_exited), fact(exits.on_spawn_failed)
        self.on_broken, self.on_lost = fact(exits.on_broken), fact(exits.on_lost)

    def _fact(self, handle: Callable[_P, None]) -> Callable[_P, list[Command]]:
        """A method that handles a fact, and returns what was decided."""

        def handle_and_take(*args: _P.args, **kwargs: _P.kwargs) -> list[Command]:
            handle(*args, **kwargs)
            return self.outbox.take()

        return handle_and_take

    # --- facts about the host -----------------------------------------------------------------------------

    def on_configured(
        self,
        settings: Settings,
        terms: Mapping[str, Terms],
        grouped: Mapping[str, Sequence[ModelSpec]],
        now: float,
    ) -> list[Command]:
        """The host's file was read.  ``terms``, ``grouped``: see :meth:`.Leases.follow_file`."""
        self.limits.follow(settings)
        self.leases.follow_file(terms, grouped, now)
        self.orders.admit(now)
        self.admission.look_soon(now)
        return self.outbox.take()

    def on_saveable(self, ask: m.Saveable, now: float) -> list[Command]:
        """A model is worth saving for the load cache.  A sandboxed worker is not believed: its model is never
        saved, and the saver, which has no sandbox, would load what the worker names."""
        found = self.fleet.find(ask.worker_id)
        if found is None or found[0].spec.sandbox:
            return []
        need = cache_saves.need(ask.nbytes)
        self.saves.request(SaveRequest(ask.key, ask.order, ask.blob, need, environment=ask.environment))
        self.orders.admit(now)
        return self.outbox.take()

    def on_saver_ended(self, status: ExitStatus, now: float) -> list[Command]:
        """The saver and all processes that it started are reaped."""
        self.saves.ended(short=wants_more_memory(status))
        self.orders.admit(now)
        return self.outbox.take()

    def on_weighed(self, worker_id: int, nbytes: int, now: float) -> list[Command]:
        """A load of :meth:`to_weigh` has so many bytes."""
        self.outbox.extend(self.weighing.weigh(worker_id, nbytes, now))
        return self.outbox.take()

    def on_tick(self, now: float, samples: Mapping[int, Sample] = MappingProxyType({})) -> list[Command]:
        """Time has passed.  ``samples``: of all workers, if :meth:`wants_look`."""
        self.facts.kill_overdue(now)
        if self.admission.wants_look(now):
            for worker_id, sample in samples.items():  # before a load begins that they leave no memory for
                self.outbox.extend(self.facts.measurements.take_sample(worker_id, sample, now))
        self.orders.carry_out(self.admission.refuse_late(now))
        if self.admission.wants_look(now):
            self.orders.carry_out(self.admission.look(samples, now))
        return self.outbox.take()

    # --- what is known ------------------------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """Time when :meth:`on_tick` has something to do; None: not before the next fact."""
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
    def is_used(self) -> bool:
        """True if a load may be wanted soon: a proxy that has used a model is open, or a model is loaded, or
        is held or awaited by the host itself."""
        return bool(self._proxies or self.fleet.by_worker) or self.leases.holds_any

    @property
    def memory_limit(self) -> int | None:
        """Bytes that all workers together may take; None: there is no limit."""
        return None if self.limits.memory.ram == UNLIMITED else self.limits.memory.ram

    @property
    def gpu_memory_limit(self) -> int | None:
        """GPU bytes that all workers together may take; None: there is no limit."""
        return self.limits.gpu
