"""The file of a host, as far as a supervisor follows it: what is in force, and what a change of it means.

How a file is read and checked is :mod:`onnx_dl.supervisor.hostfile.reader`'s, when it changes
:mod:`onnx_dl.supervisor.hostfile.file_watch`'s, who loads what the scheduler's.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Iterator

import msgspec

from onnx_dl.core.model_files import bytes_of
from onnx_dl.core.settings import Settings
from onnx_dl.core.spec import ModelSpec, Warmup
from onnx_dl.core.terms import Terms
from onnx_dl.errors import ConfigError
from onnx_dl.protocol import control as m
from onnx_dl.supervisor.hostfile import reader
from onnx_dl.supervisor.hostfile.file_watch import FileWatch
from onnx_dl.supervisor.hostfile.reader import Configured, HostFile


class Configuration:
    """A file that was found good, and stays in force until a later version of it is."""

    def __init__(self, path: str) -> None:
        """
        Raises:
            ConfigError: it cannot be read or used; the message has file, line and reason.
        """
        self._path = path
        self._watch = FileWatch(path)  # before it is read: a change in between is one
        try:
            self.file: HostFile = reader.read(path)
        except ConfigError:
            self._watch.close()
            raise

    def sources(self) -> list[int]:
        """Descriptors to poll, for :meth:`refresh`."""
        fd = self._watch.fileno()
        return [] if fd is None else [fd]

    def refresh(self, *, asked: bool = False) -> bool:
        """Reads the file again if it changed, or if somebody ``asked`` for it; whether it is in force."""
        if not (self._watch.changed(anyway=asked) or asked):
            return False
        try:
            self.file = reader.read(self._path)
        except ConfigError as error:
            print(f"onnx-dl: {error} What was in force before stays.", file=sys.stderr, flush=True)
            return False
        return True

    def close(self) -> None:
        self._watch.close()

    # --- what it says -------------------------------------------------------------------------------------

    def named(self, name: str) -> Configured:
        """
        Raises:
            ConfigError: the file has no model of this name.
        """
        try:
            return self.file.models[name]
        except KeyError:
            known = ", ".join(self.file.models) or "none"
            raise ConfigError(
                f"There is no file {name!r}, and no model of that name in {self._path}; it has: {known}."
            ) from None

    def over(self, settings: Settings, firm: Container[str] = ()) -> Settings:
        """The settings that the file changes; not those that were given as arguments (``firm``)."""
        file = self.file
        said: dict[str, str | float | None] = {
            "memory_limit": None if file.memory_limit is None else str(file.memory_limit),
            "gpu_memory_limit": None if file.gpu_memory_limit is None else str(file.gpu_memory_limit),
            "room_timeout": file.room_timeout,
            "load_timeout": file.load_timeout,
            "metrics": file.metrics,
        }
        given = {name: value for name, value in said.items() if value is not None and name not in firm}
        return msgspec.structs.replace(settings, **given)

    def terms(self) -> dict[str, Terms]:
        """On which the host itself holds what is loaded, by the key of the model."""
        return {
            model.spec.key: Terms(ttl=model.ttl, pin=model.pin, priority=model.priority)
            for model in self.file.models.values()
        }

    def warmups(self) -> dict[str, dict[str, Warmup]]:
        """What models are run with once before they are ready, by the key of the model."""
        return {model.spec.key: model.warmup for model in self.file.models.values() if model.warmup}

    def grouped(self) -> dict[str, list[ModelSpec]]:
        """The models of each group, by the key of the group."""
        found: dict[str, list[ModelSpec]] = {}
        for model in self.file.models.values():
            if model.spec.group is not None:
                found.setdefault(model.spec.unit, []).append(model.spec)
        return found

    def wanted(self) -> Iterator[m.Acquire]:
        """What is to be loaded without anybody asking for it."""
        for model in self.file.models.values():
            if model.eager:
                yield m.Acquire(
                    ticket=0,
                    proxy=0,
                    spec=model.spec,
                    ttl=model.ttl,
                    file_bytes=bytes_of(model.spec.path or ""),
                    pin=model.pin,
                    priority=model.priority,
                    for_host=True,
                )
