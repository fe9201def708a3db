"""Terms on which a model is held, and options of its worker.  Checked once, where they enter."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple, Self

import msgspec

from onnx_dl.core import digests, environment, parsing
from onnx_dl.core.environment import NOTHING, Environment
from onnx_dl.core.parsing import Allowances

Ttl = Annotated[float, msgspec.Meta(ge=-1, le=sys.float_info.max)]
"""Seconds, or -1.  Infinity and NaN are refused: times cannot be compared with them."""


class Terms(msgspec.Struct, frozen=True, omit_defaults=True):
    """Terms on which one proxy, or the host itself, holds a model.

    ``ttl`` is in seconds (-1: never unloads, 0: unloads after each use); ``latency`` says how calls wait;
    ``pin`` and ``priority`` rank the model at an eviction.
    """

    ttl: Ttl = parsing.KEEP
    latency: str = "auto"
    pin: bool = False
    priority: int = 0

    @classmethod
    def parse(
        cls, ttl: object = parsing.KEEP, latency: object = "auto", pin: object = False, priority: object = 0
    ) -> Self:
        """Makes terms of a user's arguments.  Raises ConfigError: ``ttl`` is none of the three modes,
        ``latency`` none of its three or ``pin`` neither of its two, or ``priority`` no whole number."""
        return cls(
            parsing.parse_ttl(ttl),
            parsing.parse_latency(latency),
            parsing.parse_pin(pin),
            parsing.parse_priority(priority),
        )

    def changed(self, given: Mapping[str, object]) -> Terms:
        """Returns terms with some of them replaced.  Raises like :meth:`parse`."""
        return Terms.parse(**{**msgspec.structs.asdict(self), **given})


WORKER_FIELDS = (*Allowances._fields, "group", "environment", "sha256", "sandbox")
"""Fields of :class:`~onnx_dl.core.spec.ModelSpec` that :class:`WorkerOptions` sets."""


class WorkerOptions(NamedTuple):
    """Options of a model's worker.  They are part of the model's key: other options, another worker."""

    limits: Allowances = Allowances()
    group: str | None = None
    environment: Environment = NOTHING
    sha256: Mapping[str, str] = MappingProxyType({})
    sandbox: bool = False
    isolation: bool = True
    """False: the model runs in the application's own process, which has none of the others but ``sha256``."""

    @classmethod
    def parse(
        cls,
        max_memory: object = None,
        max_memory_hard: object = None,
        max_runs: object = None,
        group: object = None,
        variables: Mapping[str, str | None] | None = None,
    ) -> Self:
        """Makes options of a user's arguments.  Raises ConfigError, which names one that is not allowed."""
        return cls(
            parsing.parse_allowances(max_memory, max_memory_hard, max_runs),
            parsing.parse_group(group),
            environment.parse(variables),
        )

    def with_trust(self, sha256: object, sandbox: object) -> Self:
        """Adds ``sha256`` and ``sandbox`` of a user's arguments.  Raises ConfigError: one is not allowed."""
        return self._replace(sha256=digests.parse(sha256), sandbox=parsing.parse_sandbox(sandbox))

    def fields(self) -> dict[str, Any]:
        """Values for :data:`WORKER_FIELDS`."""
        given = (*self.limits, self.group, self.environment, dict(self.sha256), self.sandbox)
        found = dict(zip(WORKER_FIELDS, given, strict=True))
        return found if self.isolation else found | {"isolation": False}
