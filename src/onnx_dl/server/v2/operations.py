"""The operations of both protocols, and the scope that a caller needs for each."""

from __future__ import annotations

import enum


class Scope(enum.StrEnum):
    """A right of a token."""

    HEALTH = "health"
    """Needs no token."""
    INFER = "infer"
    CONTROL = "control"
    SHM = "shm"
    METRICS = "metrics"
    DASHBOARD = "dashboard"


class Operation(enum.Enum):
    """One operation; its value is the scope and a number that tells it from others of that scope."""

    SERVER_LIVE = (Scope.HEALTH, 1)
    SERVER_READY = (Scope.HEALTH, 2)
    MODEL_READY = (Scope.HEALTH, 3)
    SERVER_METADATA = (Scope.INFER, 1)
    MODEL_METADATA = (Scope.INFER, 2)
    MODEL_CONFIG = (Scope.INFER, 3)
    INFER = (Scope.INFER, 4)
    STATISTICS = (Scope.INFER, 5)
    REPOSITORY_INDEX = (Scope.INFER, 6)
    SETTINGS = (Scope.INFER, 7)
    """Reads the trace and logging settings."""
    MODEL_STATE = (Scope.INFER, 8)
    """Ours: state, TTL, bytes of a model."""
    REPOSITORY_LOAD = (Scope.CONTROL, 1)
    REPOSITORY_UNLOAD = (Scope.CONTROL, 2)
    SHM_STATUS = (Scope.SHM, 1)
    SHM_REGISTER = (Scope.SHM, 2)
    SHM_UNREGISTER = (Scope.SHM, 3)
    METRICS = (Scope.METRICS, 1)

    @property
    def scope(self) -> Scope:
        return self.value[0]
