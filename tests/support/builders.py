"""Short ways to make what the pure tests feed in and expect back."""

from __future__ import annotations

from typing import Any

from onnx_dl.core.events import EventType, ModelEvent
from onnx_dl.core.settings import Settings
from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import ModelDescription, TensorSpec, Usage
from onnx_dl.core.terms import Terms
from onnx_dl.protocol import codec, control, failures
from onnx_dl.supervisor.policy.commands import (
    Command,
    Emit,
    KillWorker,
    SendToClient,
    SendToWorker,
    StartWorker,
)
from onnx_dl.supervisor.policy.scheduler import Scheduler
from onnx_dl.supervisor.processes.worker_process import exit_status
from onnx_dl.tensors.arena import Arena, Mappings
from onnx_dl.tensors.segment import create

A, B = b"client-a", b"client-b"
SETTINGS = Settings(python="python", load_timeout=100.0, exit_grace=5.0, stable_after=10.0)
USAGE = Usage(rss=3_000_000, private=2_000_000, gpu=None)
EPOCH = 1_000_000.0

DESCRIPTION = ModelDescription(
    inputs=[TensorSpec("x", "tensor(float)", ["batch", 4, None])],
    outputs=[TensorSpec("y", "tensor(float)", [1])],
    overridable_initializers=[],
    modelmeta={"version": 1, "custom_metadata_map": {"a": "b"}},
    providers=["CPUExecutionProvider"],
    provider_options={"CPUExecutionProvider": {}},
    options={"config": {}},
)


def spec(key: str = "m", **fields: Any) -> ModelSpec:
    return ModelSpec(key=key, name=f"{key}.onnx", cwd="/work", path=f"{key}.onnx", **fields)


def acquire(ticket: int, proxy: int = 1, ttl: float = -1.0, key: str = "m", **terms: Any) -> control.Acquire:
    return control.Acquire(ticket=ticket, proxy=proxy, spec=spec(key), terms=Terms(ttl, **terms))


def unload(ticket: int, key: str = "m", force: bool = False) -> control.Unload:
    return control.Unload(ticket=ticket, key=key, force=force)


def ready(worker_id: int = 1, seconds: float = 0.5) -> control.WorkerReady:
    return control.WorkerReady(
        worker_id=worker_id,
        address=f"address-{worker_id}",
        secret=f"secret-{worker_id}",
        description=DESCRIPTION,
        seconds=seconds,
    )


def failed(worker_id: int = 1, error: Exception | None = None) -> control.WorkerFailed:
    return control.WorkerFailed(
        worker_id=worker_id, failure=failures.describe(error or ValueError("not a model"))
    )


# --- expected commands -----------------------------------------------------------------------------------


def start(worker_id: int = 1, key: str = "m") -> StartWorker:
    return StartWorker(worker_id, spec(key))


def order(worker_id: int, message: codec.Message) -> SendToWorker:
    return SendToWorker(worker_id, message)


def kill(worker_id: int = 1) -> KillWorker:
    return KillWorker(worker_id)


def granted(client: bytes, ticket: int, worker_id: int = 1) -> SendToClient:
    message = ready(worker_id)
    return SendToClient(
        client,
        control.Granted(
            ticket=ticket,
            worker_id=worker_id,
            pid=100 + worker_id,
            address=message.address,
            secret=message.secret,
            description=DESCRIPTION,
        ),
    )


def unloaded(client: bytes, ticket: int, was_loaded: bool = True) -> SendToClient:
    return SendToClient(client, control.Unloaded(ticket=ticket, was_loaded=was_loaded))


def event(
    seq: int,
    kind: str,
    now: float,
    worker_id: int = 1,
    key: str = "m",
    pid: int | None = -1,
    usage: Usage | None = None,
    **fields: Any,
) -> Emit:
    """``pid`` -1: the pid that :class:`Rig` gives to the worker; None: it has none yet."""
    usage = usage or Usage()
    return Emit(
        ModelEvent(
            seq=seq,
            type=EventType(kind),
            at=EPOCH + now,
            model=f"{key}.onnx",
            key=key,
            worker_id=worker_id,
            pid=100 + worker_id if pid == -1 else pid,
            rss=usage.rss or None,
            gpu=usage.gpu,
            **fields,
        )
    )


def told(commands: list[Command], kind: type[codec.Message]) -> list[Any]:
    """Messages of a kind that go to clients."""
    return [c.message for c in commands if isinstance(c, SendToClient) and isinstance(c.message, kind)]


def events(commands: list[Command]) -> list[ModelEvent]:
    return [c.event for c in commands if isinstance(c, Emit)]


def starts(commands: list[Command]) -> list[StartWorker]:
    return [c for c in commands if isinstance(c, StartWorker)]


class Rig:
    """A scheduler and short ways to bring one model into each state.  Worker n has pid 100 + n."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(SETTINGS, EPOCH)

    def loading(
        self, now: float = 0.0, client: bytes = A, key: str = "m", ttl: float = -1.0
    ) -> list[Command]:
        """One acquire, ticket 1, and its worker has started."""
        s = self.scheduler
        commands = s.on_acquire(client, acquire(1, key=key, ttl=ttl), now)
        for command in starts(commands):
            s.on_spawned(command.worker_id, 100 + command.worker_id)
            commands += s.on_started(command.worker_id)
        return commands

    def ready(self, now: float = 1.0, worker_id: int = 1, **fields: Any) -> list[Command]:
        """As :meth:`loading` at 0, then ready."""
        commands = self.loading(0.0, **fields)
        return commands + self.scheduler.on_ready(ready(worker_id), USAGE, now)

    def draining(self, now: float = 2.0) -> list[Command]:
        """As :meth:`ready`, then ``unload()`` with ticket 50 of client B."""
        commands = self.ready()
        return commands + self.scheduler.on_unload(B, unload(50), now)

    def crash(self, now: float, worker_id: int, status: int = 11) -> list[Command]:
        """A worker that was started dies while it loads."""
        return self.scheduler.on_exited(worker_id, exit_status(status), "", now)


# --- arenas ----------------------------------------------------------------------------------------------


class Peer:
    """An announcer whose peer is in this process: blocks that an arena shares are mapped at once."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.mappings = Mappings()
        self.room = 1000

    def shared(self, block: int, size: int, fd: int) -> None:
        self.calls.append(("shared", block))
        self.mappings.add(block, size, fd)

    def dropped(self, block: int) -> None:
        self.calls.append(("dropped", block))
        self.mappings.drop([block])


def arena() -> tuple[Arena, Peer]:
    peer = Peer()
    return Arena(peer), peer


def segment(size: int) -> int:
    return create(size)
