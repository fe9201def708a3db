"""What becomes of a model when its files have changed, policies of versions, wishes, and health: all pure."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from onnx_dl.core.events import EventType, ModelEvent
from onnx_dl.errors import (
    ConfigError,
    FilesChanging,
    LoadTimeout,
    MemoryLimitExceeded,
    RemoteError,
    WorkerDied,
)
from onnx_dl.server.interfaces import Served
from onnx_dl.server.repository import plan, versions
from onnx_dl.server.repository.catalog import Candidate
from onnx_dl.server.repository.health import Health, lasts
from onnx_dl.server.repository.loads import Outcome
from onnx_dl.server.repository.plan import Plan, content
from onnx_dl.server.repository.retries import Retries
from onnx_dl.server.repository.wishes import Wishes


def entry(version: int, generation: str = "a", **fields: Any) -> Served:
    return Served(
        name="m",
        version=str(version),
        path=f"/m/{version}/model.onnx",
        generation=f"{version}{generation}",
        **fields,
    )


def candidate(*entries: Served, there: tuple[int, ...] = (), **fields: Any) -> Candidate:
    versions = {int(each.version) for each in entries} | set(there)
    return Candidate(name="m", place="/m", entries=entries, there=tuple(map(str, sorted(versions))), **fields)


def present(*entries: Served) -> dict[str, Served]:
    return {each.version: each for each in entries}


def states(planned: Plan) -> list[tuple[str, str, bool]]:
    return [(row.version, row.state, bool(row.reason)) for row in planned.rows]


def generations(planned: Plan) -> list[str]:
    return [each.generation for each in planned.served]


def test_what_nobody_serves_yet_is_served_without_a_load() -> None:
    planned = plan.decide(candidate(entry(1), entry(3)), {})
    assert (generations(planned), planned.to_load) == (["1a", "3a"], ())
    assert states(planned) == [("1", "READY", False), ("3", "READY", False)]


def test_a_load_that_a_client_asked_for_comes_first() -> None:
    planned = plan.decide(candidate(entry(1)), {}, must_load=True)
    assert (planned.served, planned.to_load) == ((), (entry(1),))
    assert states(planned) == [("1", "LOADING", False)]
    assert generations(plan.decide(candidate(entry(1)), {}, must_load=True, loaded={content(entry(1))})) == [
        "1a"
    ]


def test_a_new_version_is_loaded_before_the_old_one_goes() -> None:
    new, before = candidate(entry(2), there=(1,)), present(entry(1))
    planned = plan.decide(new, before)
    assert (generations(planned), planned.to_load) == (["1a"], (entry(2),))
    assert states(planned) == [("1", "READY", False), ("2", "LOADING", False)]
    planned = plan.decide(new, before, loaded={content(entry(2))})
    assert (generations(planned), planned.to_load) == (["2a"], ())
    assert states(planned) == [("2", "READY", False)]


def test_a_changed_file_is_loaded_before_the_old_content_goes() -> None:
    new, before = candidate(entry(1, "b")), present(entry(1, "a"))
    planned = plan.decide(new, before)
    assert (generations(planned), planned.to_load) == (["1a"], (entry(1, "b"),))
    assert generations(plan.decide(new, before, loaded={content(entry(1, "b"))})) == ["1b"]


def test_the_same_content_with_another_configuration_needs_no_load() -> None:
    planned = plan.decide(candidate(entry(1, max_batch_size=4)), present(entry(1)))
    assert planned.served == (entry(1, max_batch_size=4),)
    assert not planned.to_load


def test_other_arguments_are_another_worker() -> None:
    planned = plan.decide(candidate(entry(1, arguments={"ttl": 1})), present(entry(1)))
    assert planned.to_load


def test_what_does_not_load_replaces_nothing() -> None:
    failures = {content(entry(2)): "it is bad"}
    planned = plan.decide(candidate(entry(2), there=(1,)), present(entry(1)), failures=failures)
    assert (generations(planned), planned.to_load) == (["1a"], ())
    assert states(planned) == [("1", "READY", False), ("2", "UNAVAILABLE", True)]
    failures = {content(entry(1, "b")): "it is bad"}
    planned = plan.decide(candidate(entry(1, "b")), present(entry(1, "a")), failures=failures)
    assert (generations(planned), states(planned)) == (["1a"], [("1", "READY", True)])


def test_a_failure_counts_for_its_content_only() -> None:
    failures = {content(entry(1, "b")): "it is bad"}
    planned = plan.decide(candidate(entry(1, "c")), present(entry(1, "a")), failures=failures)
    assert planned.to_load == (entry(1, "c"),)


def test_a_file_that_is_no_model_replaces_nothing() -> None:
    planned = plan.decide(candidate(there=(1, 2), broken={"2": "no model"}), present(entry(1)))
    assert (generations(planned), states(planned)) == (
        ["1a"],
        [("1", "READY", False), ("2", "UNAVAILABLE", True)],
    )
    planned = plan.decide(candidate(there=(1,), broken={"1": "no model"}), present(entry(1)))
    assert (generations(planned), states(planned)) == (["1a"], [("1", "READY", True)])
    planned = plan.decide(candidate(there=(1,), broken={"1": "no model"}), {})
    assert (generations(planned), states(planned)) == ([], [("1", "UNAVAILABLE", True)])


def test_a_version_that_is_deleted_goes_even_if_another_is_broken() -> None:
    planned = plan.decide(candidate(there=(2,), broken={"2": "no model"}), present(entry(1)))
    assert (generations(planned), states(planned)) == ([], [("2", "UNAVAILABLE", True)])


def test_a_version_that_is_removed_stays_until_the_one_before_is_loaded() -> None:
    """One who goes back to the version before removes the newest one."""
    back, before = candidate(entry(1)), present(entry(2))
    planned = plan.decide(back, before)
    assert (generations(planned), planned.to_load) == (["2a"], (entry(1),))
    assert states(planned) == [("1", "LOADING", False), ("2", "READY", True)]
    planned = plan.decide(back, before, failures={content(entry(1)): "it is bad"})
    assert (generations(planned), planned.to_load) == (["2a"], ())
    assert states(planned) == [("1", "UNAVAILABLE", True), ("2", "READY", True)]
    planned = plan.decide(back, before, loaded={content(entry(1))})
    assert (generations(planned), states(planned)) == (["1a"], [("1", "READY", False)])


def test_a_folder_that_cannot_be_read_withdraws_nothing() -> None:
    planned = plan.decide(candidate(problem="no right to read", is_unreadable=True), present(entry(1)))
    assert (generations(planned), states(planned)) == (["1a"], [("1", "READY", True)])
    planned = plan.decide(candidate(problem="no folder of a version"), present(entry(1)))
    assert (generations(planned), states(planned)) == ([], [("", "UNAVAILABLE", True)])


def test_nobody_wants_an_unloaded_model() -> None:
    assert plan.decide(candidate(entry(1)), {}).is_wanted
    for found in (candidate(entry(1), broken={"2": "no model"}), candidate(problem="no versions")):
        assert not plan.unloaded(found, "").is_wanted


def test_a_configuration_that_cannot_be_used_changes_nothing() -> None:
    planned = plan.decide(candidate(there=(1, 2), problem="config.pbtxt:1: x"), present(entry(1)))
    assert (generations(planned), states(planned)) == (["1a"], [("1", "READY", True)])
    planned = plan.decide(candidate(problem="no versions"), {})
    assert states(planned) == [("", "UNAVAILABLE", True)]


def test_a_model_that_a_load_must_tell_about_is_loaded_first() -> None:
    planned = plan.decide(candidate(entry(1), unread=("1",)), {})
    assert planned.to_load
    assert not planned.served


def test_an_unloaded_model_has_rows() -> None:
    planned = plan.unloaded(candidate(entry(2), broken={"1": "no model"}), "unloaded")
    assert [(row.version, row.state, row.reason) for row in planned.rows] == [
        ("1", "UNAVAILABLE", "no model"),
        ("2", "UNAVAILABLE", "unloaded"),
    ]


def test_something_is_always_served_that_was_there_and_did_not_fail() -> None:
    """All ways in which the two versions of a model may have changed, been loaded or failed."""
    for first, second, old in itertools.product(("", "a", "b", "bad"), repeat=3):
        entries = [entry(v, g) for v, g in ((1, first), (2, second)) if g and g != "bad"]
        broken = {str(v): "no model" for v, g in ((1, first), (2, second)) if g == "bad"}
        before = present(entry(1, old)) if old not in ("", "bad") else {}
        there = tuple(v for v, g in ((1, first), (2, second)) if g)
        found = candidate(*entries, there=there, broken=broken)
        for outcome in itertools.product((True, False), repeat=len(entries)):
            loaded = {content(each) for each, good in zip(entries, outcome, strict=True) if good}
            failures = {content(each): "bad" for each, good in zip(entries, outcome, strict=True) if not good}
            for planned in (
                plan.decide(found, before),
                plan.decide(found, before, loaded=loaded, failures=failures),
            ):
                is_failing = bool(failures) and planned.to_load == ()
                case = f"{first=} {second=} {old=} {outcome=} {planned}"
                served = {each.version for each in planned.served}
                assert {row.version for row in planned.rows if row.state == "READY"} == served, case
                assert not before or not (first or planned.to_load or is_failing) or served, case
                for each in planned.served:
                    was_there = before.get(each.version) == each
                    assert was_there or not before or content(each) in loaded, case
            final = plan.decide(found, before, loaded=loaded, failures=failures)
            assert not final.to_load


# --- versions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "chosen"),
    [
        ({}, [11]),
        ({"latest": {}}, [11]),
        ({"latest": {"num_versions": 2}}, [9, 11]),
        ({"latest": {"num_versions": 9}}, [1, 9, 11]),
        ({"all": {}}, [1, 9, 11]),
        ({"specific": {"versions": [9, 1, 9, 5]}}, [1, 9]),
    ],
)
def test_policies(policy: dict[str, Any], chosen: list[int]) -> None:
    assert versions.selected(policy, {9, 1, 11}) == chosen


def test_versions_that_are_named_and_missing() -> None:
    assert versions.missing({"specific": {"versions": [9, 5]}}, {9}) == [5]
    assert versions.missing({"all": {}}, {9}) == []


def test_names_of_versions() -> None:
    names = ("1", "10", "01", "0", "-1", "1a", "", "1.0", " 1", "٣", str(2**63), str(2**63 - 1), "9" * 400)
    assert [versions.number(name) for name in names] == [
        1, 10, None, None, None, None, None, None, None, None, None, 2**63 - 1, None,
    ]  # fmt: skip


# --- wishes -----------------------------------------------------------------------------------------------


def test_without_explicit_control_all_is_served() -> None:
    for control in ("none", "poll"):
        wishes = Wishes(control, {"a"})
        wishes.begin(["nobody"], {"a"})
        assert wishes.is_served("b")
        assert wishes.is_followed("b")
        assert not wishes.is_loaded_first("b")


def test_explicit_control() -> None:
    wishes = Wishes("explicit", {"own"})
    wishes.begin(["a"], {"a", "b", "own"})
    assert [wishes.is_served(name) for name in ("a", "b", "own")] == [True, False, True]
    assert [wishes.is_loaded_first(name) for name in ("a", "b", "own")] == [True, False, False]
    assert [wishes.is_followed(name) for name in ("a", "b", "own")] == [False, True, False]
    wishes.load("b", "{}")
    assert (wishes.is_served("b"), wishes.overrides) == (True, {"b": "{}"})
    wishes.unload("b")
    wishes.unload("own")
    assert (wishes.is_served("b"), wishes.is_served("own"), wishes.overrides) == (False, False, {})
    wishes.load("own", None)
    assert wishes.is_served("own")


def test_what_is_loaded_at_the_start() -> None:
    wishes = Wishes("explicit", ())
    wishes.begin(["*"], {"a", "b"})
    assert wishes.is_loaded_first("a") and wishes.is_loaded_first("b")
    with pytest.raises(ConfigError, match="'\\*' loads all models"):
        Wishes("explicit", ()).begin(["*", "a"], {"a"})
    with pytest.raises(ConfigError, match="There is no model 'x', 'y' to be loaded"):
        Wishes("explicit", ()).begin(["y", "a", "x"], {"a"})


# --- health -----------------------------------------------------------------------------------------------


def event(kind: EventType, key: str, detail: str | None = None, retry_after: float = 0.0) -> ModelEvent:
    return ModelEvent(
        seq=1, type=kind, at=0.0, model="m", key=key, worker_id=1, detail=detail, retry_after=retry_after
    )


def test_a_load_that_fails_is_known_until_one_succeeds() -> None:
    health, served = Health(), [entry(1), entry(2)]
    assert health.note(event(EventType.FAILED, "1a", "no operator"), served, 0.0)
    assert health.failing == {content(entry(1)): "failed to load 'm' version 1: no operator"}
    assert not health.note(event(EventType.FAILED, "1a", "no operator"), served, 0.0)
    assert health.note(event(EventType.READY, "1a"), served, 0.0)
    assert not health.failing


def test_a_worker_that_worked_and_died_changes_nothing() -> None:
    health, served = Health(), [entry(1)]
    assert not health.note(event(EventType.READY, "1a"), served, 0.0)
    assert not health.note(event(EventType.FAILED, "1a", "killed"), served, 0.0)
    assert not health.failing


def test_events_of_others_change_nothing() -> None:
    health = Health()
    assert not health.note(event(EventType.FAILED, "other"), [entry(1)], 0.0)
    assert not health.note(event(EventType.UNLOADED, "1a"), [entry(1)], 0.0)
    grouped = entry(1, arguments={"group": "g"})
    assert not health.note(event(EventType.FAILED, "1a"), [grouped], 0.0)


def test_the_mark_of_a_failure_ends_when_the_host_may_load_again() -> None:
    """It may be due to the machine, and without a request the model would never be loaded again."""
    health, served = Health(), [entry(1), entry(2)]
    failed = event(EventType.FAILED, "1a", "no processes", retry_after=4.0)
    assert health.note(failed, served, 100.0)
    assert lasts(failed) == 14
    assert not health.note(failed, served, 105.0)  # it lasts longer, and the index says the same
    assert not health.end(118.0)
    assert health.failing
    assert health.end(119.0)
    assert not health.failing


def test_the_mark_of_a_file_does_not_end() -> None:
    health, served = Health(), [entry(1)]
    health.mark(entry(1), "no operator")
    assert not health.note(event(EventType.FAILED, "1a", "no operator"), served, 0.0)
    assert not health.end(1e9)
    assert health.failing == {content(entry(1)): "no operator"}


# --- retries ----------------------------------------------------------------------------------------------


def test_a_load_is_tried_again_later_and_later() -> None:
    retries, died = Retries(), [Outcome(WorkerDied("killed"))]
    now = 0.0
    for wait in (10, 20, 40, 80, 160, 320, 600, 600):
        retries.note("m", died, now)
        assert not retries.is_due("m", now + wait - 1)
        now += wait
        assert retries.is_due("m", now)
    retries.note("m", [], now)
    assert not retries.is_due("m", 1e9)


@pytest.mark.parametrize("error", [LoadTimeout("slow"), MemoryLimitExceeded("large"), WorkerDied("killed")])
def test_what_is_tried_again(error: Exception) -> None:
    retries = Retries()
    retries.note("m", [Outcome(error)], 0.0)
    assert (retries.is_due("m", 9.0), retries.is_due("m", 10.0)) == (False, True)
    retries.note("m", [Outcome(FilesChanging("copied"))], 0.0)
    assert retries.is_due("m", 0.0)
    retries.note("m", [Outcome(RemoteError("Fail", "no operator", ""))], 0.0)
    assert not retries.is_due("m", 1e9)
