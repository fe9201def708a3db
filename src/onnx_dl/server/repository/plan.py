"""Decisions on one model when its files, or what is known of its loads, have changed.  Pure.

The rules: what worked keeps working until something newer is known to work; a file that does not load never
replaces one that does; what nobody serves yet is served without a load.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from onnx_dl.server.interfaces import IndexRow, Served
from onnx_dl.server.repository.catalog import Candidate

Content = tuple[str, str, str]
"""Name, version and generation: one content of one version."""


class Plan(msgspec.Struct, frozen=True):
    """``served``: what is served from now on; ``rows``: of the index; ``to_load``: what must be loaded before
    it is served, and then asked about again; ``is_wanted``: somebody wants the model to be served."""

    served: tuple[Served, ...] = ()
    rows: tuple[IndexRow, ...] = ()
    to_load: tuple[Served, ...] = ()
    is_wanted: bool = True


def content(entry: Served) -> Content:
    """Identity of this entry's content."""
    return entry.name, entry.version, entry.generation


def decide(
    candidate: Candidate,
    present: Mapping[str, Served],
    *,
    loaded: Collection[Content] = (),
    failures: Mapping[Content, str] | None = None,
    must_load: bool = False,
) -> Plan:
    """Decides what is served of a model.

    Args:
        candidate: the model as it is on the disk.
        present: what is served of it now, by version.
        loaded: contents that have been loaded since the files were read, or need not be.
        failures: reasons of loads that failed, by content.
        must_load: all versions are loaded before they are served: a client asked for that.
    """
    if candidate.problem:
        return _with_problem(candidate, present)
    failures = failures or {}
    served: dict[str, Served] = {}
    rows: dict[str, IndexRow] = {}
    to_load: list[Served] = []
    waits = False
    for entry in candidate.entries:
        old = present.get(entry.version)
        is_kept = old is not None and is_same(old, entry)
        reason = "" if content(entry) in loaded else failures.get(content(entry), "")
        must = must_load or entry.version in candidate.unread or (bool(present) and not is_kept)
        if reason and (must or not is_kept):
            waits = True
            _keep(entry.name, entry.version, old, reason, served, rows)
        elif must and content(entry) not in loaded:
            to_load.append(entry)
            waits = True
            if old is not None:
                served[entry.version] = old
                rows[entry.version] = IndexRow(entry.name, entry.version, "READY")
            else:
                rows[entry.version] = IndexRow(entry.name, entry.version, "LOADING")
        else:
            served[entry.version] = entry
            rows[entry.version] = IndexRow(entry.name, entry.version, "READY", reason)
    for version, reason in candidate.broken.items():
        _keep(candidate.name, version, present.get(version), reason, served, rows)
    for version in _staying(candidate, present, waits=waits) - rows.keys():
        served[version] = present[version]
        reason = "" if version in candidate.there else "it is served until another version is loaded"
        rows[version] = IndexRow(candidate.name, version, "READY", reason)
    return Plan(_sorted(served), tuple(sorted(rows.values(), key=_order)), tuple(to_load))


def unloaded(candidate: Candidate, reason: str, state: str | None = None) -> Plan:
    """Nothing of the model is served, because a client has not asked for it, or no longer wants it.
    ``state``: None: UNAVAILABLE."""
    if candidate.problem:
        return msgspec.structs.replace(_with_problem(candidate, {}), is_wanted=False)
    chosen = [*(entry.version for entry in candidate.entries), *candidate.broken]
    rows = [
        IndexRow(candidate.name, version, state or "UNAVAILABLE", candidate.broken.get(version, reason))
        for version in chosen
    ]
    return Plan((), tuple(sorted(rows, key=_order)), is_wanted=False)


def is_same(one: Served, other: Served) -> bool:
    """True if one proxy serves both: the same content, loaded and held in the same way."""
    return (one.path, one.generation, one.arguments) == (other.path, other.generation, other.arguments)


def _with_problem(candidate: Candidate, present: Mapping[str, Served]) -> Plan:
    """The versions that were served and are still there, or may be, stay."""
    kept = {
        version: entry
        for version, entry in present.items()
        if candidate.is_unreadable or version in candidate.there
    }
    rows = [
        IndexRow(candidate.name, version, "READY" if version in kept else "UNAVAILABLE", candidate.problem)
        for version in kept or candidate.there or ("",)
    ]
    return Plan(_sorted(kept), tuple(sorted(rows, key=_order)))


def _staying(candidate: Candidate, present: Mapping[str, Served], *, waits: bool) -> set[str]:
    """Versions that are served until what replaces them works.

    ``waits``: for a load.  Then also one that was removed stays, as by a person who goes back to the version
    before: its worker has what is needed.
    """
    if waits:
        return set(present)
    return set(present).intersection(candidate.there) if candidate.broken else set()


def _keep(
    name: str,
    version: str,
    old: Served | None,
    reason: str,
    served: dict[str, Served],
    rows: dict[str, IndexRow],
) -> None:
    """A version whose present file cannot be served: what it was before stays, if there was anything."""
    if old is None:
        rows[version] = IndexRow(name, version, "UNAVAILABLE", reason)
        return
    served[version] = old
    rows[version] = IndexRow(name, version, "READY", f"an earlier content is served, because {reason}")


def _sorted(served: Mapping[str, Served]) -> tuple[Served, ...]:
    return tuple(sorted(served.values(), key=lambda entry: int(entry.version)))


def _order(row: IndexRow) -> tuple[str, int]:
    return row.name, int(row.version or 0)
