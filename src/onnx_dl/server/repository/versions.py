"""Which versions of a model are served: Triton's version policies, as pure functions."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

DEFAULT: Final[dict[str, Any]] = {"latest": {"num_versions": 1}}
"""The policy of a configuration without one."""
_NUMBER: Final = re.compile(r"[1-9][0-9]{0,18}", re.ASCII)


def number(name: str) -> int | None:
    """The version that a folder's name stands for; None: none, and the folder is ignored, as Triton does
    also for names that begin with a zero."""
    if not _NUMBER.fullmatch(name):
        return None
    found = int(name)
    return found if found < 2**63 else None


def selected(policy: Mapping[str, Any], there: Collection[int]) -> list[int]:
    """The versions that are served, in order.

    Args:
        policy: in Triton's JSON form; empty: the default.
        there: versions that the repository has.
    """
    if "all" in policy:
        return sorted(there)
    if "specific" in policy:
        wanted: Iterable[int] = policy["specific"].get("versions", ())
        return sorted(set(wanted) & set(there))
    count = policy.get("latest", {}).get("num_versions", 1) or 1
    return sorted(there)[-count:]


def missing(policy: Mapping[str, Any], there: Collection[int]) -> list[int]:
    """Versions that the policy names and the repository does not have."""
    return sorted(set(policy.get("specific", {}).get("versions", ())) - set(there))
