"""Several models in one worker, as an engine: each member is loaded by an engine of its own.

Covers loading members one after another and finding the one that a caller names.  A member that does not load
does not affect the others; its callers get the error.  docs/groups.md: purpose and cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import msgspec

from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import ModelDescription
from onnx_dl.errors import EngineError
from onnx_dl.protocol import failures
from onnx_dl.workers.engines import base as backends
from onnx_dl.workers.engines.base import Backend
from onnx_dl.workers.load_cache.rules import SaveOrder


class Group:
    """The members that loaded, and the errors of the others, by key."""

    def __init__(self, members: Mapping[str, Backend], failed: Mapping[str, Exception]) -> None:
        self.members = members
        self._failed = {key: msgspec.to_builtins(failures.describe(error)) for key, error in failed.items()}

    def describe(self) -> ModelDescription:
        return ModelDescription(
            members={key: member.describe() for key, member in self.members.items()},
            failed=self._failed,
        )

    def ready(self, seconds: float, blobs: Mapping[str, int]) -> list[SaveOrder]:
        return [save for member in self.members.values() for save in member.ready(seconds, blobs)]

    def run(self, *_: object) -> NoReturn:
        raise EngineError("A group has no run() of its own; a lane names one of its models.")

    run_async = bind = rerun = invoke = run

    def close(self) -> None:
        for member in self.members.values():
            member.close()


def open_model(spec: ModelSpec, blobs: Mapping[str, int]) -> Group:
    """Loads the members of a group.

    Raises:
        Exception: the first member's, if none loads.
    """
    members: dict[str, Backend] = {}
    failed: dict[str, Exception] = {}
    for member in spec.members:
        try:
            backends.enter(member.cwd)
            members[member.key] = backends.load(member, blobs)
        except Exception as error:  # sent to the proxies that wait for this member
            failed[member.key] = error
    if not members:
        raise next(iter(failed.values()))
    return Group(members, failed)
