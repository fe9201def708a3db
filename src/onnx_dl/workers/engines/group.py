"""Several models in one worker, as an engine among the others: each member is loaded by its own.

Covers loading them one after the other and finding the one that a caller names.  A member that does not load
takes no other with it; its callers are told why.  What a group is good for, and what it costs, is told in
docs/groups.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import ModelDescription
from onnx_dl.errors import EngineError
from onnx_dl.protocol import failures
from onnx_dl.workers.engines import base as backends
from onnx_dl.workers.engines.base import Backend, Save


class Group:
    """The members that loaded, by key, and how the others failed."""

    def __init__(self, members: Mapping[str, Backend], failed: Mapping[str, Any]) -> None:
        self.members = members
        self._failed = failed

    def describe(self) -> ModelDescription:
        return ModelDescription(
            members={key: member.describe() for key, member in self.members.items()},
            failed=dict(self._failed),
        )

    def ready(self, seconds: float, blobs: Mapping[str, int]) -> list[Save]:
        return [save for member in self.members.values() for save in member.ready(seconds, blobs)]

    def run(self, *_: Any) -> Any:
        raise EngineError("A group has no run() of its own; a lane names one of its models.")

    run_async = repeat = rerun = invoke = run

    def close(self) -> None:
        for member in self.members.values():
            member.close()


def open_model(spec: ModelSpec, blobs: Mapping[str, int]) -> Group:
    """Loads the members of a group.

    Raises:
        Exception: what the first of them raised, if none loads.
    """
    members: dict[str, Backend] = {}
    errors: dict[str, Exception] = {}
    for member in spec.members:
        try:
            backends.enter(member.cwd)
            members[member.key] = backends.load(member, blobs)
        except Exception as error:  # whatever its engine raised belongs to whoever asked for this one
            errors[member.key] = error
    if not members:
        raise next(iter(errors.values()))
    return Group(
        members, {key: msgspec.to_builtins(failures.describe(error)) for key, error in errors.items()}
    )
