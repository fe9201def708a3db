"""Runs all steps and requests against one server."""

from __future__ import annotations

import json
from typing import Any

from tests.server.conformance import plain
from tests.server.conformance.clients import KINDS, Kit, outcome
from tests.server.conformance.steps import STEPS


def outcomes(http: str, grpc: str, used: dict[str, set[str]] | None = None) -> dict[str, Any]:
    """By step, by client; below ``plain`` by request.  Into ``used`` go the methods that were called."""
    found: dict[str, Any] = {"plain": plain.outcomes(http)}
    kits = [Kit(kind, http if kind.startswith("http") else grpc) for kind in KINDS]
    for name, step in STEPS.items():
        found[name] = {kit.kind: outcome(step, kit) for kit in kits}
    for kit in kits:
        kit.close()
        if used is not None:
            used[kit.kind] = kit.used
    plainly: dict[str, Any] = json.loads(json.dumps(found))
    return plainly
