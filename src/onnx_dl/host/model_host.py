"""ModelHost: a host as the user has it, which opens, preloads and adopts models."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import msgspec

from onnx_dl.client.host_client import recent_events
from onnx_dl.concurrency.background import Background
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.concurrency.waits import Mailbox
from onnx_dl.core import keywords
from onnx_dl.core.events import ModelEvent
from onnx_dl.core.parsing import parse_gpu_limit, parse_size, parse_timeout, parse_worker_stderr
from onnx_dl.core.settings import Settings, settings
from onnx_dl.core.status import ModelStatus
from onnx_dl.core.terms import Terms
from onnx_dl.core.text import format_bytes
from onnx_dl.errors import ConfigError
from onnx_dl.host.mixed_host import MixedHost
from onnx_dl.session.inference_session import InferenceSessionProxy
from onnx_dl.session.proxy import ModelProxy


class ModelHost(MixedHost):
    """One supervisor process with the models of this application, and models in this process.

    Nothing is started until the first model is used or :meth:`start` is called.  The end of a ``with`` block,
    :meth:`close` and the exit of the interpreter end it.  :func:`connect` returns a host that several
    applications share.
    """

    def __init__(
        self,
        *,
        memory_limit: int | str | None = None,
        gpu_memory_limit: int | str | Mapping[int, int | str] | None = None,
        config: str | os.PathLike[str] | None = None,
        worker_stderr: str | None = None,
    ) -> None:
        """
        Args:
            memory_limit: bytes that all workers together may take, and as many for all models in this
                process, as a number or as text such as ``"2GiB"``; None: ``ONNX_DL_MEMORY_LIMIT``, or four
                fifths of the memory of the machine or its cgroup.
            gpu_memory_limit: the same for the memory of all GPUs together, or a limit for each GPU by its
                number, such as ``{0: "6GiB", 1: "10GiB"}``; None: ``ONNX_DL_GPU_MEMORY_LIMIT``, or four
                fifths of the memory of all GPUs, if NVML reports it.
            config: path of a file with the host's models and limits (docs/host-file.md); None:
                ``ONNX_DL_CONFIG``.  It is read when the supervisor starts, and again whenever it changes.
                The start fails if the file is not valid.
            worker_stderr: target of the lines that workers write on stderr.  ``"inherit"``: this
                application's stderr; ``"log"``: the logger ``onnx_dl.worker``; None:
                ``ONNX_DL_WORKER_STDERR``.

        Raises:
            ConfigError: (a ValueError) an argument is not valid.
        """
        given: dict[str, str | int | dict[int, int]] = {}
        if memory_limit is not None:
            given["memory_limit"] = parse_size(memory_limit)
        if gpu_memory_limit is not None:
            given["gpu_memory_limit"] = parse_gpu_limit(gpu_memory_limit)
        explicit = list(given)
        if config is not None:
            given["config"] = os.path.abspath(config)
        if worker_stderr is not None:
            given["worker_stderr"] = parse_worker_stderr(worker_stderr)
        super().__init__(msgspec.structs.replace(settings(), **given), explicit)

    @classmethod
    def of_name(cls, name: str | None, given: Settings | None = None, explicit: Sequence[str] = ()) -> Self:
        """The shared host of this name, or, for None, one of this application.

        ``given``: its settings if it is started; None: those of the environment.  ``explicit``: names of
        settings that its file does not change.
        """
        host = object.__new__(cls)
        MixedHost.__init__(host, given or settings(), explicit, name)
        return host

    def __repr__(self) -> str:
        """Uses only what this process knows: no message is sent, and no error is raised."""
        if "link" not in vars(self):  # its constructor raised
            return f"<{type(self).__name__}, not set up>"
        connection = self.link.connection
        count = self._models.count() + (0 if self._local is None else self._local.count())
        is_there = connection is not None and connection.usable
        parts = [
            "private" if self.name is None else f"shared {self.name!r}",
            f"supervisor pid {connection.supervisor_pid}" if connection and is_there else "not started",
            f"{count} model{'' if count == 1 else 's'} used here",
        ]
        if (limit := self._settings.memory_limit) is not None:
            parts.append(f"memory limit {format_bytes(limit)}")
        return f"<{type(self).__name__} {', '.join(parts)}>"

    def preload(
        self,
        proxies: Iterable[ModelProxy],
        progress: Callable[[ModelProxy, int, int], object] | None = None,
        *,
        timeout: float | None = None,
    ) -> None:
        """Loads models, all at the same time, and returns when all are ready.

        Args:
            proxies: proxies of this host; each holds its model from then on, as after its first call.
            progress: is called in this thread as ``progress(proxy, ready, total)`` when a model is ready.
            timeout: seconds for all loads together; loads that take longer continue.

        Raises:
            ExceptionGroup: some models did not load.  It has one error per model, such as LoadTimeout, with a
                note that names the model.  The other models are ready.
        """
        waiting = list(proxies)
        failed: list[Exception] = []
        deadline = Deadline(parse_timeout(timeout), movable=True)
        ended: Mailbox[tuple[ModelProxy, BaseException | None]] = Mailbox()
        loads = [
            Background(functools.partial(_load, proxy, deadline, ended), "onnx-dl-preload")
            for proxy in waiting
        ]
        try:
            for load in loads:
                load.begin()
            for ready in range(1, len(waiting) + 1):
                proxy, error = ended.get()
                if error is None:
                    if progress is not None:
                        progress(proxy, ready - len(failed), len(waiting))
                elif isinstance(error, Exception):
                    error.add_note(f"while {proxy!r} was loaded")
                    failed.append(error)
                else:
                    raise error
        finally:  # Ctrl-C, or what progress() raised: no thread waits on
            deadline.end()
            for load in loads:
                load.end(None)
        if failed:
            raise ExceptionGroup(f"{len(failed)} of {len(waiting)} models did not load", failed)

    def open(self, model: str | bytes | os.PathLike[str], *args: Any, **kwargs: Any) -> InferenceSessionProxy:
        """Makes a proxy of a model in this host, for example ``host.open("a.onnx", ttl=60)``.

        Args:
            model: path of a file, or the model as bytes; or the name of a model in the host's file
                (``host.toml``), which then says how the model is loaded.
            *args: as for :class:`~onnx_dl.InferenceSessionProxy`.
            **kwargs: as for :class:`~onnx_dl.InferenceSessionProxy`; with a name only ``ttl``, ``pin``,
                ``priority`` and ``latency``, which override the file's.

        Raises:
            ConfigError: another argument was given with a name.
            Exception: as :class:`~onnx_dl.InferenceSessionProxy`.
        """
        if not (self.has_names and isinstance(model, str) and not os.path.exists(model)):
            return InferenceSessionProxy(model, *args, host=self, **kwargs)
        named = self.named(model)
        if strange := kwargs.keys() - set(Terms.__struct_fields__):
            raise ConfigError(
                f"{', '.join(sorted(strange))}: the host's file says how {named.spec.name!r} is loaded; "
                "only ttl, latency, pin and priority may be given with a name."
                + keywords.hint(sorted(strange), Terms.__struct_fields__)
            )
        return InferenceSessionProxy.of_spec(named.spec, named.terms.changed(kwargs), *args, host=self)

    def adopt(
        self,
        model: str,
        *,
        ttl: float | str | None = None,
        pin: bool | None = None,
        priority: int | None = None,
        environment: Mapping[str, str | None] | None = None,
    ) -> ModelStatus:
        """Loads a model that the host itself holds, also after this application has ended.

        Args:
            model: path of a file, or the name of a model in the host's file.
            ttl: seconds without use after which the model is unloaded; -1: never; None: as in the host's
                file, or never.
            pin: as for :class:`~onnx_dl.InferenceSessionProxy`; None: as in the host's file.
            priority: as for :class:`~onnx_dl.InferenceSessionProxy`; None: as in the host's file.
            environment: as for :class:`~onnx_dl.InferenceSessionProxy`; not with a name.

        Returns:
            The model's status.

        Raises:
            Exception: as the model's first call.
        """
        terms = {"ttl": ttl, "pin": pin, "priority": priority, "environment": environment or None}
        given = {name: value for name, value in terms.items() if value is not None}
        with self.open(model, **given) as proxy:
            return proxy.adopt()

    def recent_events(self, limit: int = 100) -> list[ModelEvent]:
        """The last events of the host, oldest first; ``limit`` at most.

        A host keeps its last 300 events, also those from before this application connected to it.  Empty
        if the host has not started.  Starts and loads nothing.

        Raises:
            SupervisorDied: a private host has died.
            SupervisorTimeout: the supervisor does not answer.
        """
        return recent_events(self, limit)


def _load(
    proxy: ModelProxy,
    deadline: Deadline,
    ended: Mailbox[tuple[ModelProxy, BaseException | None]],
    _: Deadline,
) -> None:
    error: BaseException | None = None
    try:
        proxy.load_by(deadline)
    except BaseException as failed:
        error = failed
    ended.put((proxy, error))
