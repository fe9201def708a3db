"""The table of one process: uses keep proxies open, also while tables change in other threads.

Proxies need no host until they are used, so none is started.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onnx_dl.host.model_host import ModelHost
from onnx_dl.server.interfaces import IndexRow, Models, Served, ServedTable
from onnx_dl.server.repository import specs
from onnx_dl.server.repository.models import ModelTable, UsedModel
from onnx_dl.server.v2.failures import RequestFailure
from onnx_dl.session.inference_session import InferenceSessionProxy
from tests.support.small import plus
from tests.support.waiting import allowed, eventually


@pytest.fixture
def models() -> Iterator[ModelTable]:
    with ModelHost() as host:
        table = ModelTable(host)
        yield table
        table.close()


def entry(version: int, generation: str = "k", name: str = "m", **arguments: Any) -> Served:
    return Served(
        name=name, version=str(version), path=f"/m/{version}", generation=generation, arguments=arguments
    )


def table(*entries: Served, rows: tuple[IndexRow, ...] = ()) -> ServedTable:
    ready = [IndexRow(each.name, each.version, "READY") for each in entries]
    return ServedTable(list(entries), [*ready, *rows], True)


def is_closed(used: UsedModel) -> bool:
    return used.proxy._handle.lease.closed


def test_it_is_what_the_server_sees(models: ModelTable) -> None:
    seen: Models = models
    assert seen.versions("m") == []


def test_the_newest_version_is_the_largest_number(models: ModelTable) -> None:
    models.apply(table(entry(10), entry(9), entry(2)))
    assert models.versions("m") == ["2", "9", "10"]
    assert models.find("m").version == "10"
    assert models.find("m", "9").version == "9"
    assert models.find("m", "009").version == "9"


def test_the_same_table_again_changes_nothing(models: ModelTable) -> None:
    models.apply(table(entry(1)))
    with models.use("m") as used:
        proxy = used.proxy
    assert models.apply(table(entry(1))) == []
    with models.use("m") as used:
        assert used.proxy is proxy


def test_another_configuration_keeps_the_proxy(models: ModelTable) -> None:
    models.apply(table(entry(1)))
    with models.use("m") as used:
        proxy = used.proxy
    changed = Served(name="m", version="1", path="/m/1", generation="k", max_batch_size=4, slot=3)
    models.apply(table(changed))
    with models.use("m") as used:
        assert used.proxy is proxy
        assert used.entry == changed


def test_a_proxy_closes_after_its_last_use(models: ModelTable) -> None:
    models.apply(table(entry(1)))
    with models.use("m") as first, models.use("m") as second:
        assert first is second
        (leaving,) = models.apply(table(entry(1, "other")))
        assert leaving is first
        with models.use("m") as now:
            assert now is not first
        assert not is_closed(first)
    assert is_closed(first)
    assert first.gone.is_set()


def test_a_proxy_that_nobody_uses_closes_at_once(models: ModelTable) -> None:
    models.apply(table(entry(1)))
    (leaving,) = models.apply(table())
    assert is_closed(leaving)
    with pytest.raises(RequestFailure, match="is not found"):
        models.find("m")


def test_what_was_prepared_is_used(models: ModelTable) -> None:
    models.apply(table(entry(1)))
    prepared = models.prepare(entry(1, "new"))
    assert models.prepare(entry(1, "new")) is prepared
    models.apply(table(entry(1, "new")))
    with models.use("m") as used:
        assert used is prepared
    assert models.prepare(entry(1, "new")) is prepared  # it is served: there is nothing to prepare
    models.discard(entry(1, "new"))
    assert not is_closed(prepared)


def test_what_was_prepared_and_is_not_served_closes(models: ModelTable) -> None:
    prepared = models.prepare(entry(1, "bad"))
    models.discard(entry(1, "other"))
    assert not is_closed(prepared)
    models.discard(entry(1, "bad"))
    models.discard(entry(1, "bad"))
    assert is_closed(prepared)
    later = models.prepare(entry(1, "x"))
    models.prepare(entry(1, "y"))
    assert is_closed(later)


def test_close_closes_all(models: ModelTable) -> None:
    models.apply(table(entry(1)))
    prepared = models.prepare(entry(2))
    with models.use("m") as used:
        models.close()
        assert not is_closed(used)
    assert is_closed(used)
    assert is_closed(prepared)


@pytest.mark.parametrize("version", ["x", "-1", "1.0", " 1", "1\n", "٣", "9" * 20, "1/2"])
def test_a_version_that_is_no_number(models: ModelTable, version: str) -> None:
    models.apply(table(entry(1)))
    with pytest.raises(RequestFailure, match="failed to get model version from specified version") as raised:
        models.find("m", version)
    assert raised.value.http == 400


def test_rows_tell_why_a_version_is_not_served(models: ModelTable) -> None:
    rows = (
        IndexRow("gone", "1", "UNAVAILABLE", "unloaded"),
        IndexRow("bad", "1", "UNAVAILABLE", "it is bad"),
        IndexRow("soon", "1", "LOADING"),
        IndexRow("never", "1", "UNAVAILABLE"),
    )
    models.apply(table(entry(1), rows=rows))
    for name, status, words in (
        ("gone", 404, "has no available versions"),
        ("never", 404, "has no available versions"),
        ("bad", 503, "has no available versions: it is bad"),
        ("soon", 503, "has no available versions: it loads"),
    ):
        with pytest.raises(RequestFailure, match=f"Request for unknown model: '{name}' {words}") as raised:
            models.find(name)
        assert raised.value.http == status
        with pytest.raises(RequestFailure):
            models.check_ready(name)
    models.check_ready("m")
    models.apply(ServedTable([entry(1)], [IndexRow("m", "1", "UNAVAILABLE", "it failed")], True))
    assert models.find("m").version == "1"
    with pytest.raises(RequestFailure, match="version 1 is not at ready state: it failed"):
        models.check_ready("m")


def test_no_use_ever_sees_a_closed_proxy(models: ModelTable) -> None:
    """Eight threads use the newest version while tables change all the time."""
    models.apply(table(entry(1, "0")))
    stop, errors, uses = threading.Event(), [], [0] * 8
    begun = threading.Barrier(9)

    def call(number: int) -> None:
        begun.wait(allowed(10))
        while not stop.is_set():
            with models.use("m") as used:
                if is_closed(used):
                    errors.append(used.entry)
                uses[number] += 1

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    begun.wait(allowed(10))
    rng = random.Random(18)
    made = []
    for number in range(400):
        new = entry(rng.randint(1, 3), str(number))
        if rng.random() < 0.5:
            made.append(models.prepare(new))
        made += models.apply(table(new))
    eventually(lambda: all(uses), "a use in each thread")
    stop.set()
    for thread in threads:
        thread.join(allowed(10))
    models.close()
    assert not errors
    assert all(uses)
    assert all(is_closed(used) for used in made)


# --- keys -------------------------------------------------------------------------------------------------


def test_a_served_model_shares_the_worker_of_other_programs(tmp_path: Path) -> None:
    """Its key is that of a proxy of the same file with the same options."""
    path = tmp_path / "model.onnx"
    path.write_bytes(plus(1))
    with ModelHost() as host:
        for given in (
            {},
            {"ttl": 5, "pin": True},
            {"max_memory": 10**9, "max_runs": 3},
            {"providers": ["CPUExecutionProvider"]},
            {"providers": ["CPUExecutionProvider"], "group": "g"},
            {"environment": {"A": "b"}},
        ):
            generation = specs.generation(str(path), given)
            served = Served(name="m", version="1", path=str(path), generation=generation, arguments=given)
            with InferenceSessionProxy(str(path), host=host, **given) as proxy:
                assert specs.spec_of(served).key == proxy._handle.spec.key
            again = specs.arguments_of(specs.spec_of(served), specs.terms(given))
            assert specs.generation(str(path), again) == generation


def test_another_content_is_another_generation(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(plus(1))
    first = specs.generation(str(path), {})
    (tmp_path / "new").write_bytes(plus(1))
    (tmp_path / "new").rename(path)
    assert specs.generation(str(path), {}) != first
    outside = specs.generation(str(path), {}, (("w.bin", (1, 2, 3, 4)),))
    assert outside != specs.generation(str(path), {}, (("w.bin", (1, 2, 3, 5)),))
    assert specs.key_of(outside) == specs.generation(str(path), {})
