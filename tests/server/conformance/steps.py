"""What is called, in this order; each step is called with all four clients in turn."""

from __future__ import annotations

import importlib
from typing import Final

from tests.server.conformance.registry import REGISTERED, Step

for _part in ("server", "inference", "mistakes", "repository", "memory"):
    importlib.import_module(f"tests.server.conformance.steps_{_part}")

STEPS: Final[dict[str, Step]] = REGISTERED
