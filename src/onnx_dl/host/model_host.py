"""ModelHost: a host as the user has it, which opens, preloads and adopts models."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import msgspec

from onnx_dl.concurrency.background import Background
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.concurrency.waits import Mailbox
from onnx_dl.core.parsing import parse_size, parse_timeout, parse_worker_stderr
from onnx_dl.core.settings import settings
from onnx_dl.core.status import ModelStatus
from onnx_dl.core.terms import Terms
from onnx_dl.errors import ConfigError
from onnx_dl.host.mixed_host import MixedHost
from onnx_dl.session.inference_session import InferenceSessionProxy
from onnx_dl.session.proxy import ModelProxy


class ModelHost(MixedHost):
    """One supervisor process and what this application has in it, and models in this process.

    Starts nothing until the first model is used or :meth:`start` is called.  Use it as a context manager, or
    :meth:`close` it; the interpreter's exit closes it too.  One that several applications share comes from
    :func:`connect`.
    """

    def __init__(
        self,
        *,
        memory_limit: int | str | None = None,
        gpu_memory_limit: int | str | None = None,
        config: str | os.PathLike[str] | None = None,
        worker_stderr: str | None = None,
    ) -> None:
        """
        Args:
            memory_limit: bytes that all workers together may take, and as many for all models in this
                process, as a number or as text such as ``"2GiB"``; None: what
                ``ONNX_DL_MEMORY_LIMIT`` says, or four fifths of the machine's or its cgroup's.
            gpu_memory_limit: the same of GPU memory (``ONNX_DL_GPU_MEMORY_LIMIT``); without it, four fifths
                of what all GPUs have, if NVML tells it.
            config: a file that says which models the host has and what they may take (docs/host-file.md);
                None: what ``ONNX_DL_CONFIG`` says.  It is read when the supervisor starts, which raises if it
                cannot be used, and again whenever it changes.
            worker_stderr: where lines go that workers write on stderr: ``"inherit"``, to this application's
                stderr as it is at that moment; ``"log"``, to the logger ``onnx_dl.worker``; None: what
                ``ONNX_DL_WORKER_STDERR`` says.

        Raises:
            ValueError: (as :class:`~onnx_dl.errors.ConfigError`) one is no size, or ``worker_stderr`` neither
                of its two.
        """
        limits = {"memory_limit": memory_limit, "gpu_memory_limit": gpu_memory_limit}
        given: dict[str, str | int] = {
            name: parse_size(size) for name, size in limits.items() if size is not None
        }
        explicit = list(given)
        if config is not None:
            given["config"] = os.path.abspath(config)
        if worker_stderr is not None:
            given["worker_stderr"] = parse_worker_stderr(worker_stderr)
        super().__init__(msgspec.structs.replace(settings(), **given), explicit)

    @classmethod
    def of_name(cls, name: str | None) -> Self:
        """The shared host of this name, or, for None, one of this application."""
        host = object.__new__(cls)
        MixedHost.__init__(host, settings(), name=name)
        return host

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
            progress: called in this thread as ``progress(proxy, ready, total)`` when one more is ready.
            timeout: seconds for all of them; loads that take longer go on.

        Raises:
            ExceptionGroup: some did not load; it holds what each raised, LoadTimeout for one, with a note
                that names the model.  The others are ready.
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
        """A proxy of a model in this host: :class:`~onnx_dl.InferenceSessionProxy` with its arguments, for
        example ``host.open("a.onnx", ttl=60, pin=False, priority=0)``.

        A name that is no file is looked up in the host's own (``host.toml``), which says how the model is
        loaded; only ``ttl``, ``pin``, ``priority`` and ``latency`` may then be given, in its place.

        Raises: like the proxy's constructor.
        """
        if not (self.has_names and isinstance(model, str) and not os.path.exists(model)):
            return InferenceSessionProxy(model, *args, host=self, **kwargs)
        named = self.named(model)
        if strange := kwargs.keys() - set(Terms.__struct_fields__):
            raise ConfigError(
                f"{', '.join(sorted(strange))}: the host's file says how {named.spec.name!r} is loaded; "
                "only ttl, latency, pin and priority may be given with a name."
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
        """Loads a model and has the host itself hold it, also when this application is gone.

        Args:
            model: a path, or a name in the host's file.
            ttl: seconds without use after which it unloads all the same; -1: never; None: what the host's
                file says of a name, else never.
            pin, priority: as a proxy's; None: what the host's file says.
            environment: as a proxy's, of a path.

        Returns:
            Its status.

        Raises: like the model's first call.
        """
        terms = {"ttl": ttl, "pin": pin, "priority": priority, "environment": environment or None}
        given = {name: value for name, value in terms.items() if value is not None}
        with self.open(model, **given) as proxy:
            return proxy.adopt()


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
