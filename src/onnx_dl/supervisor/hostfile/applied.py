"""Applies the file of a host to its supervisor, at the start and after each change."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import msgspec

from onnx_dl.core.model_files import bytes_of
from onnx_dl.core.settings import Settings
from onnx_dl.core.spec import ModelSpec
from onnx_dl.errors import ConfigError
from onnx_dl.protocol import control as m
from onnx_dl.supervisor.boundary import report
from onnx_dl.supervisor.hostfile import reader
from onnx_dl.supervisor.hostfile.file_watch import FileWatch
from onnx_dl.supervisor.hostfile.reader import Configured, HostFile
from onnx_dl.supervisor.policy.commands import Run
from onnx_dl.supervisor.policy.records import HOST
from onnx_dl.supervisor.policy.scheduler import Scheduler


class AppliedFile:
    """The last valid version of a host's file.  It stays in force until the file has a newer valid one."""

    def __init__(self, settings: Settings, explicit: Iterable[str] = ()) -> None:
        """``settings``: those that the file changes, and its path.  ``explicit``: names of settings that were
        given as arguments, and that it does not change.

        Raises:
            ConfigError: it cannot be read or used; the message has file, line and reason.
        """
        self._path = settings.config
        self._settings = settings
        self._explicit = explicit
        self._watch = FileWatch(self._path)  # before it is read, so that no change is missed in between
        try:
            self._file: HostFile = reader.read(self._path)
        except ConfigError:
            self._watch.close()
            raise

    def sources(self) -> list[int]:
        """Descriptors to poll, for :meth:`refresh`."""
        fd = self._watch.fileno()
        return [] if fd is None else [fd]

    def refresh(self, *, asked: bool = False) -> bool:
        """Reads the file again if it changed or if ``asked``; true: a new version is in force."""
        if not (self._watch.changed(anyway=asked) or asked):
            return False
        try:
            self._file = reader.read(self._path)
        except ConfigError as error:
            report(f"{error} The earlier settings stay in force.")
            return False
        return True

    def apply(self, scheduler: Scheduler, prepare_load: Callable[[m.Acquire, float], None], run: Run) -> None:
        """Gives the scheduler the present content, and asks for the models that load with the host."""
        now = time.monotonic()
        models = self._file.models.values()
        scheduler.orders.warmups = {model.spec.key: model.warmup for model in models if model.warmup}
        terms = {model.spec.key: model.terms for model in models}
        run(scheduler.on_configured(self.settings, terms, self.grouped(), now))
        for ask in self._eager():
            prepare_load(ask, now)
            run(scheduler.on_acquire(HOST, ask, now))

    def named(self, name: str) -> Configured:
        """The model of this name.

        Raises:
            ConfigError: the file has no model of this name.
        """
        try:
            return self._file.models[name]
        except KeyError:
            known = ", ".join(self._file.models) or "none"
            raise ConfigError(
                f"There is no file {name!r}, and no model of that name in {self._path}; it has: {known}."
            ) from None

    @property
    def settings(self) -> Settings:
        """The supervisor's settings, with those that the file changes."""
        names = ("memory_limit", "gpu_memory_limit", "room_timeout", "load_timeout", "metrics")
        in_file = {name: getattr(self._file, name) for name in names if name not in self._explicit}
        given = {name: value for name, value in in_file.items() if value is not None}
        return msgspec.structs.replace(self._settings, **given)

    def grouped(self) -> dict[str, list[ModelSpec]]:
        """The models of each group, by the key of the group."""
        found: dict[str, list[ModelSpec]] = {}
        for model in self._file.models.values():
            if model.spec.group is not None:
                found.setdefault(model.spec.unit, []).append(model.spec)
        return found

    def _eager(self) -> Iterator[m.Acquire]:
        """Requests for the models that load with the host."""
        for model in self._file.models.values():
            if model.eager:
                yield m.Acquire(
                    ticket=0,
                    proxy=0,
                    spec=model.spec,
                    terms=model.terms,
                    file_bytes=bytes_of(model.spec.path or ""),
                    for_host=True,
                )
