"""Repositories with a real host: loads, unloads, and changes under traffic."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pytest

from onnx_dl.core.lifecycle import ModelState
from onnx_dl.errors import ConfigError, FilesChanging, WorkerDied
from onnx_dl.host.model_host import ModelHost
from onnx_dl.server.interfaces import IndexRow, ServedTable
from onnx_dl.server.interfaces import Served as Entry
from onnx_dl.server.options import ServeOptions
from onnx_dl.server.processes.children import Children
from onnx_dl.server.processes.front import Front
from onnx_dl.server.processes.local_control import LocalControl
from onnx_dl.server.repository import loads, retries
from onnx_dl.server.repository.catalog import Candidate, NamedModel
from onnx_dl.server.repository.loads import Outcome
from onnx_dl.server.repository.models import ModelTable, UsedModel
from onnx_dl.server.repository.repository import Repository
from onnx_dl.server.v2.failures import RequestFailure
from tests.support import zoo
from tests.support.small import plus
from tests.support.waiting import DEADLINE, allowed

X = np.array([1.0, 2.0], np.float32)
_T = TypeVar("_T")


def put(root: Path, name: str, version: int | str, data: bytes, filename: str = "model.onnx") -> Path:
    """Puts a version there by a rename, as a careful copier does."""
    folder = root / name / str(version)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = root / name / f".{version}.unfinished"
    unfinished.write_bytes(data)
    os.replace(unfinished, folder / filename)
    return folder / filename


def configure(root: Path, name: str, text: str) -> None:
    (root / name).mkdir(parents=True, exist_ok=True)
    (root / name / "config.pbtxt").write_text(text)


class Served:
    """A repository that runs in this loop, and the tables that it has handed out."""

    def __init__(
        self, host: ModelHost, models: ModelTable, options: ServeOptions, named: Sequence[NamedModel]
    ) -> None:
        self.host = host
        self.models = models
        self.published: list[ServedTable] = []
        self.repository = Repository(options, host, models, self._publish, named)

    async def _publish(self, table: ServedTable) -> None:
        self.published.append(table)

    def rows(self) -> list[tuple[str, str, str]]:
        return [(row.name, row.version, row.state) for row in self.models.table.rows]

    def row(self, name: str, version: str) -> IndexRow:
        (row,) = [each for each in self.models.table.rows if (each.name, each.version) == (name, version)]
        return row

    def run(self, name: str, version: str = "") -> tuple[str, float]:
        """One inference: the version that ran, and what it adds."""
        with self.models.use(name, version) as used:
            (y,) = used.proxy.run(None, {"x": X})
            return used.entry.version, float(y[0] - X[0])

    async def arun(self, name: str, version: str = "") -> tuple[str, float]:
        return await asyncio.to_thread(self.run, name, version)

    def is_ready(self, name: str) -> bool:
        try:
            self.models.check_ready(name)
        except RequestFailure:
            return False
        return True

    def loaded(self) -> set[str]:
        return {each.model for each in self.host.snapshot().models if each.state is ModelState.READY}


@contextlib.asynccontextmanager
async def serving(
    host: ModelHost, *roots: Path, named: Sequence[NamedModel] = (), **options: Any
) -> AsyncIterator[Served]:
    given = {"poll_every": 3600.0, "repository": tuple(map(str, roots)), **options}
    models = ModelTable(host, takes_any=options.get("model_control") == "none")
    served = Served(host, models, ServeOptions(**given), named)
    await served.repository.start()
    try:
        yield served
    finally:
        await served.repository.close()
        models.close()


def in_loop(scenario: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    async def bounded() -> _T:
        return await asyncio.wait_for(scenario(), allowed(3 * DEADLINE))

    return asyncio.run(bounded())


async def until(happened: Callable[[], object], what: str) -> None:
    """Returns when it is true."""
    async with asyncio.timeout(allowed(DEADLINE)):
        while not happened():
            await asyncio.sleep(0.005)


async def refused(work: Awaitable[object]) -> RequestFailure:
    with pytest.raises(RequestFailure) as raised:
        await work
    return raised.value


# --- without changes --------------------------------------------------------------------------------------


def test_what_is_there_is_ready_and_not_loaded(module_host: ModelHost, tmp_path: Path) -> None:
    put(tmp_path, "a", 1, plus(1))
    put(tmp_path, "a", 3, plus(3))
    put(tmp_path, "a", "03", plus(4))
    put(tmp_path, "b", 7, plus(7))
    configure(
        tmp_path, "b", 'name: "b"\nmax_batch_size: 4\ninput { name: "x" dims: [] data_type: TYPE_FP32 }'
    )
    (tmp_path / "a" / "notes").mkdir()
    (tmp_path / ".git").mkdir()

    async def scenario() -> None:
        async with serving(module_host, tmp_path) as served:
            assert served.rows() == [("a", "3", "READY"), ("b", "7", "READY")]
            assert not served.loaded()
            assert served.is_ready("a")
            await until(lambda: served.models.table.is_ready, "ready")
            entry = served.models.find("b")
            assert entry.max_batch_size == 4
            assert entry.config["input"][0]["dims"] == []
            assert entry.inputs[0].shape == (-1,)
            assert entry.arguments["ttl"] == 300
            assert await served.arun("a") == ("3", 3.0)
            assert served.loaded() == {str(tmp_path / "a" / "3" / "model.onnx")}

    in_loop(scenario)


def test_refusals_have_tritons_words(module_host: ModelHost, tmp_path: Path) -> None:
    put(tmp_path, "a", 1, plus(1))
    put(tmp_path, "broken", 1, b"not a model")

    async def scenario() -> None:
        async with serving(module_host, tmp_path) as served:
            for name, version, status, text in (
                ("x", "", 404, "Request for unknown model: 'x' is not found"),
                ("a", "2", 404, "Request for unknown model: 'a' version 2 is not found"),
                ("a", "one", 400, "failed to get model version from specified version string 'one'"),
                ("broken", "", 503, "Request for unknown model: 'broken' has no available versions: "),
                ("broken", "1", 503, "Request for unknown model: 'broken' version 1 is not at ready state: "),
            ):
                with pytest.raises(RequestFailure) as raised:
                    served.models.find(name, version)
                assert raised.value.http == status
                assert str(raised.value).startswith(text)
            assert not served.is_ready("broken")
            failure = await refused(served.repository.load("a", {}))
            assert (failure.http, failure.grpc) == (400, "UNAVAILABLE")
            assert "explicit model load / unload is not allowed if polling is enabled" in str(failure)
            assert (await refused(served.repository.unload("a", {}))).http == 400

    in_loop(scenario)


def test_one_broken_model_keeps_no_other_away(module_host: ModelHost, tmp_path: Path) -> None:
    put(tmp_path, "good", 1, plus(1))
    put(tmp_path, "slip", 1, plus(1))
    configure(tmp_path, "slip", "\nmax_batch_sise: 4")
    put(tmp_path, "sequence", 1, plus(1))
    configure(tmp_path, "sequence", "sequence_batching { }\n")
    put(tmp_path, "wrong", 1, plus(1))
    configure(tmp_path, "wrong", 'input {\n name: "x"\n data_type: TYPE_INT8\n dims: -1 }')
    (tmp_path / "empty").mkdir()

    async def scenario() -> None:
        async with serving(module_host, tmp_path, strict_readiness=True) as served:
            assert served.row("good", "1").state == "READY"
            slip = "config.pbtxt:2: max_batch_sise is not a field here. Did you mean max_batch_size?"
            assert served.row("slip", "1").reason == f"{tmp_path}/slip/{slip}"
            assert f"{tmp_path}/sequence/config.pbtxt:1: " in served.row("sequence", "1").reason
            assert f"{tmp_path}/wrong/config.pbtxt:3: " in served.row("wrong", "1").reason
            assert "has no folder of a version" in served.row("empty", "").reason
            assert await served.arun("good") == ("1", 1.0)
            assert not served.models.table.is_ready

    in_loop(scenario)


def test_two_models_of_one_name_are_both_refused(module_host: ModelHost, tmp_path: Path) -> None:
    put(tmp_path / "one", "a", 1, plus(1))
    put(tmp_path / "two", "a", 1, plus(2))

    async def scenario() -> None:
        async with serving(module_host, tmp_path / "one", tmp_path / "two") as served:
            reason = served.row("a", "1").reason
            assert f"{tmp_path}/one/a and {tmp_path}/two/a" in reason

    in_loop(scenario)


def test_a_repository_that_is_not_there_prevents_the_start(module_host: ModelHost, tmp_path: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(ConfigError, match=f"The repository {tmp_path}/absent cannot be read"):
            async with serving(module_host, tmp_path / "absent"):
                pass

    in_loop(scenario)


def test_a_file_by_name_in_onnxruntimes_own_format(module_host: ModelHost, tmp_path: Path) -> None:
    """Its signature comes with the first load, which the server makes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "model.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(plus(5), options, providers=zoo.CPU)

    async def scenario() -> None:
        async with serving(module_host, models={"five": str(tmp_path / "model.ort")}) as served:
            await until(lambda: served.models.table.is_ready, "ready")
            entry = served.models.find("five")
            assert [each.name for each in (*entry.inputs, *entry.outputs)] == ["x", "y"]
            assert entry.config["input"][0]["data_type"] == "TYPE_FP32"
            assert await served.arun("five") == ("1", 5.0)

    in_loop(scenario)


# --- explicit control -------------------------------------------------------------------------------------


def test_explicit_loads_and_unloads(module_host: ModelHost, tmp_path: Path) -> None:
    path = put(tmp_path, "a", 1, plus(1))
    put(tmp_path, "b", 1, plus(2))

    async def scenario() -> None:
        async with serving(module_host, tmp_path, model_control="explicit", load_models=("b",)) as served:
            await until(lambda: served.models.table.is_ready, "ready")
            assert served.rows() == [("a", "1", "UNAVAILABLE"), ("b", "1", "READY")]
            with pytest.raises(RequestFailure, match="Request for unknown model: 'a'") as raised:
                served.models.find("a")
            assert raised.value.http == 404
            await served.repository.load("a", {})
            assert str(path) in served.loaded()
            assert ("a", "1", "LOADING") in [
                (row.name, row.version, row.state) for table in served.published for row in table.rows
            ]
            assert await served.arun("a") == ("1", 1.0)
            await served.repository.unload("a", {"withdraw": False})
            assert str(path) not in served.loaded()
            assert await served.arun("a") == ("1", 1.0)
            await served.repository.unload("a", {"unload_dependents": True})
            assert str(path) not in served.loaded()
            row = served.row("a", "1")
            assert (row.state, row.reason) == ("UNAVAILABLE", "unloaded")
            assert not served.is_ready("a")
            with pytest.raises(RequestFailure, match="has no available versions") as raised:
                served.models.find("a")
            assert raised.value.http == 404
            assert served.models.table.is_ready
            await served.repository.unload("a", {})  # it is unloaded already
            await served.repository.unload("nobody", {})
            await served.repository.load("a", {})
            assert await served.arun("a") == ("1", 1.0)

    in_loop(scenario)


async def left_alone(served: Served, work: Coroutine[Any, Any, None], state: str) -> None:
    """Goes away when the index has this state, and returns when the work has ended."""
    begun = len(served.published)
    task = asyncio.create_task(work)
    await until(lambda: len(served.published) > begun, "the first table")
    assert [row.state for row in served.published[begun].rows] == [state]
    task.cancel()
    await until(lambda: len(served.published) > begun + 1, "the last table")


def test_a_client_that_goes_away_leaves_no_half_load(module_host: ModelHost, tmp_path: Path) -> None:
    put(tmp_path, "a", 1, plus(1))

    async def scenario() -> None:
        async with serving(module_host, tmp_path, model_control="explicit") as served:
            control = LocalControl(cast(Front, None), cast(Children, None))
            control.repository = served.repository
            await served.repository.has_started.wait()
            await left_alone(served, control.load("a", {}), "LOADING")
            assert await served.arun("a") == ("1", 1.0)
            await left_alone(served, control.unload("a", {}), "UNLOADING")
            assert served.rows() == [("a", "1", "UNAVAILABLE")]

    in_loop(scenario)


def test_a_load_that_is_cancelled_leaves_what_was_served(
    module_host: ModelHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "a", 1, plus(1))
    put(tmp_path, "b", 1, plus(2))
    prepared: list[UsedModel] = []
    begun = asyncio.Event()

    async def endless(models: ModelTable, entry: Entry, candidate: Candidate) -> Outcome:
        prepared.append(models.prepare(entry))
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    async def scenario() -> None:
        async with serving(module_host, tmp_path, model_control="explicit", load_models=("a",)) as served:
            await served.repository.has_started.wait()
            put(tmp_path, "a", 1, plus(3))
            with monkeypatch.context() as patched:
                patched.setattr(loads, "load", endless)
                for name in ("a", "b"):
                    begun.clear()
                    task = asyncio.create_task(served.repository.load(name, {}))
                    await begun.wait()
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
            assert all(used.gone.is_set() for used in prepared)
            assert served.rows() == [("a", "1", "READY"), ("b", "1", "UNAVAILABLE")]
            assert "its load was given up" in served.row("b", "1").reason
            await served.repository.load("a", {})
            await served.repository.load("b", {})
            assert [await served.arun(name) for name in ("a", "b")] == [("1", 3.0), ("1", 2.0)]

    in_loop(scenario)


def test_a_look_undoes_no_load(module_host: ModelHost, tmp_path: Path) -> None:
    """A client loads the model between the look at its files and the takeover."""
    put(tmp_path, "a", 1, plus(1))

    async def scenario() -> None:
        async with serving(module_host, tmp_path, model_control="explicit") as served:
            configure(tmp_path, "a", "max_batch_size: 8")
            changes = await served.repository._changes()
            assert changes.keys() == {"a"}
            await served.repository.load("a", {"config": '{"max_batch_size": 16}'})
            await served.repository._take_over("a", changes["a"])
            assert served.models.find("a").max_batch_size == 16

    in_loop(scenario)


def test_strict_readiness_asks_for_wanted_models_only(module_host: ModelHost, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        put(tmp_path, name, 1, plus(1))

    async def scenario() -> None:
        options = {"model_control": "explicit", "strict_readiness": True, "load_models": ("a", "b")}
        async with serving(module_host, tmp_path, **options) as served:
            await served.repository.has_started.wait()
            assert served.models.table.is_ready
            await served.repository.unload("b", {})
            assert served.models.table.is_ready
            put(tmp_path, "c", 1, b"no model")
            await refused(served.repository.load("c", {}))
            assert not served.models.table.is_ready

    in_loop(scenario)


def test_going_back_to_the_version_before(host: ModelHost, tmp_path: Path) -> None:
    put(tmp_path, "a", 1, plus(1))
    new = put(tmp_path, "a", 2, plus(2))

    async def scenario() -> None:
        async with serving(host, tmp_path, model_control="poll") as served:
            async with Traffic(served, "a", threads=2) as traffic:
                new.unlink()
                new.parent.rmdir()
                await served.repository.look()
                assert served.rows() == [("a", "1", "READY")]
                await traffic.more()
            assert not traffic.errors, traffic.errors[0]
            assert set(traffic.results) == {("2", 2.0), ("1", 1.0)}

    in_loop(scenario)


def test_a_load_with_a_configuration(module_host: ModelHost, tmp_path: Path) -> None:
    put(tmp_path, "a", 1, plus(1))
    configure(tmp_path, "a", "max_batch_size: 8")

    async def scenario() -> None:
        async with serving(module_host, tmp_path, model_control="explicit") as served:
            await served.repository.load("a", {})
            assert served.models.find("a").config["max_batch_size"] == 8
            for wrong in (
                '"parameters": {"config": {{"max_batch_size": "16"}}}',
                "[]",
                '{"max_batch": 1}',
                "{",
            ):
                failure = await refused(served.repository.load("a", {"config": wrong}))
                assert failure.http == 400
                assert "failed to load 'a'" in str(failure)
                assert served.models.find("a").config["max_batch_size"] == 8
            config = '{"max_batch_size":"16", "input":[{"name":"x","data_type":"TYPE_INT8"}]}'
            failure = await refused(served.repository.load("a", {"config": config}))
            assert failure.http == 400
            assert served.models.find("a").config["max_batch_size"] == 8
            await served.repository.load("a", {"config": '{"max_batch_size":"16"}'})
            assert served.models.find("a").config["max_batch_size"] == 16
            await served.repository.load("a", {})
            assert served.models.find("a").config["max_batch_size"] == 8
            file = await refused(served.repository.load("a", {"config": "{}", "file:1/model.onnx": "AAAA"}))
            assert (file.http, file.grpc) == (400, "INTERNAL")
            assert "failed to poll from model repository" in str(file)
            for parameters in ({"confg": "{}"}, {"config": 1}):
                assert (await refused(served.repository.load("a", parameters))).http == 400
            for wrong_name in ("nobody", "../a", "", "a/1", ".", "a\0", "x" * 5000):
                failure = await refused(served.repository.load(wrong_name, {}))
                assert failure.http == 404
                assert "failed to poll from model repository" in str(failure)

    in_loop(scenario)


def test_a_file_that_onnxruntime_refuses(module_host: ModelHost, tmp_path: Path) -> None:
    """Its signature can be read, so only a load tells."""
    put(tmp_path, "bad", 1, unloadable())

    async def scenario() -> None:
        async with serving(module_host, tmp_path, model_control="explicit") as served:
            failure = await refused(served.repository.load("bad", {}))
            assert failure.http == 503
            assert str(failure).startswith("failed to load 'bad', ")
            assert served.row("bad", "1").state == "UNAVAILABLE"
            assert "NoSuchOperator" in served.row("bad", "1").reason
            put(tmp_path, "bad", 1, plus(6))
            await served.repository.load("bad", {})
            assert await served.arun("bad") == ("1", 6.0)

    in_loop(scenario)


def test_the_failure_of_a_load_on_use_is_told(module_host: ModelHost, tmp_path: Path) -> None:
    put(tmp_path, "bad", 1, unloadable())

    async def scenario() -> None:
        async with serving(module_host, tmp_path) as served:
            assert served.is_ready("bad")
            with pytest.raises(Exception, match="NoSuchOperator"):
                await served.arun("bad")
            await until(lambda: not served.is_ready("bad"), "the failure in the index")
            assert "failed to load 'bad' version 1: " in served.row("bad", "1").reason
            assert served.models.find("bad").version == "1"  # the host may try again

    in_loop(scenario)


def unloadable() -> bytes:
    """A model with an operator that there is not."""
    data: bytes = zoo.build(
        [zoo.node("NoSuchOperator", ["x"], ["y"])],
        [zoo.tensor("x", shape=["n"])],
        [zoo.tensor("y", shape=["n"])],
    ).SerializeToString()
    return data


# --- changes under traffic --------------------------------------------------------------------------------


class Traffic:
    """Threads that call all the time, and what they got."""

    def __init__(self, served: Served, name: str, threads: int = 4) -> None:
        self._served = served
        self._name = name
        self._stop = threading.Event()
        self.results: list[tuple[str, float]] = []
        self.errors: list[BaseException] = []
        self.threads = [threading.Thread(target=self._call) for _ in range(threads)]

    def _call(self) -> None:
        while not self._stop.is_set():
            try:
                self.results.append(self._served.run(self._name))
            except BaseException as error:
                self.errors.append(error)

    async def __aenter__(self) -> Traffic:
        for thread in self.threads:
            thread.start()
        await self.more()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self.threads:
            await asyncio.to_thread(thread.join, allowed(DEADLINE))

    async def more(self, count: int = 20) -> None:
        """Returns after so many more calls."""
        goal = len(self.results) + count
        await until(lambda: len(self.results) >= goal or self.errors, "calls")


def test_ten_takeovers_without_one_failed_request(host: ModelHost, tmp_path: Path) -> None:
    put(tmp_path, "a", 1, plus(1))

    async def scenario() -> None:
        async with serving(host, tmp_path, model_control="poll") as served:
            async with Traffic(served, "a") as traffic:
                added = 1
                for version in range(2, 12):
                    added += 1
                    if version % 2:  # the same version, by a rename
                        put(tmp_path, "a", version - 1, plus(added))
                        wanted = str(version - 1)
                    else:  # a new version, and the old one goes
                        put(tmp_path, "a", version, plus(added))
                        wanted = str(version)
                    await served.repository.look()
                    assert served.models.find("a").version == wanted
                    await traffic.more()
                    # The last but one each of the others may be a call that had begun before.
                    assert (wanted, float(added)) in traffic.results[-len(traffic.threads) :]
                    old = tmp_path / "a" / str(version - 2)
                    if version % 2 and old.exists():
                        (old / "model.onnx").unlink()
                        old.rmdir()
                        await served.repository.look()
                        await traffic.more()
            assert not traffic.errors, traffic.errors[0]
            assert len(set(traffic.results)) == 11
            await until(lambda: len(served.loaded()) == 1, "the end of all old workers")

    in_loop(scenario)


def test_what_does_not_load_never_replaces_what_does(host: ModelHost, tmp_path: Path) -> None:
    put(tmp_path, "a", 1, plus(1))

    async def scenario() -> None:
        async with serving(host, tmp_path, model_control="poll") as served:
            async with Traffic(served, "a", threads=2) as traffic:
                put(tmp_path, "a", 2, b"cut off")
                await served.repository.look()
                assert served.rows() == [("a", "1", "READY"), ("a", "2", "UNAVAILABLE")]
                assert "it is not an ONNX model" in served.row("a", "2").reason
                put(tmp_path, "a", 2, unloadable())
                await served.repository.look()
                assert served.rows() == [("a", "1", "READY"), ("a", "2", "UNAVAILABLE")]
                assert "NoSuchOperator" in served.row("a", "2").reason
                configure(tmp_path, "a", "max_batch_size: -1")
                await served.repository.look()
                assert served.row("a", "1").state == "READY"
                assert "config.pbtxt:1: 'max_batch_size' must be non-negative" in served.row("a", "1").reason
                (tmp_path / "a" / "config.pbtxt").unlink()
                await served.repository.look()
                await traffic.more()
                put(tmp_path, "a", 2, plus(2))
                await served.repository.look()
                assert served.rows() == [("a", "2", "READY")]
                await traffic.more()
            assert not traffic.errors, traffic.errors[0]
            assert set(traffic.results) == {("1", 1.0), ("2", 2.0)}

    in_loop(scenario)


def test_a_new_version_whose_worker_died_is_loaded_later(
    host: ModelHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "a", 1, plus(1))
    monkeypatch.setattr(retries, "_FIRST", 0.0)

    async def dies(models: ModelTable, entry: Entry, candidate: Candidate) -> Outcome:
        models.prepare(entry)
        return Outcome(WorkerDied("killed"))

    async def scenario() -> None:
        async with serving(host, tmp_path, model_control="poll") as served:
            put(tmp_path, "a", 2, plus(2))
            with monkeypatch.context() as patched:
                patched.setattr(loads, "load", dies)
                await served.repository.look()
                await served.repository.look()
            assert served.rows() == [("a", "1", "READY"), ("a", "2", "UNAVAILABLE")]
            await served.repository.look()
            assert served.rows() == [("a", "2", "READY")]

    in_loop(scenario)


def test_a_file_that_is_still_copied_is_waited_for(host: ModelHost, tmp_path: Path) -> None:
    put(tmp_path, "a", 1, plus(1))
    data = zoo.layers(64)

    async def scenario() -> None:
        async with serving(host, tmp_path, model_control="poll") as served:
            (tmp_path / "new" / "1").mkdir(parents=True)
            path = tmp_path / "new" / "1" / "model.onnx"
            ended = asyncio.Event()

            async def copy() -> None:
                with path.open("wb", buffering=0) as file:
                    for at in range(0, len(data), 1 + len(data) // 20):
                        file.write(data[at : at + 1 + len(data) // 20])
                        await asyncio.sleep(0.02)
                ended.set()

            copier = asyncio.create_task(copy())
            await until(path.exists, "the file")
            await served.repository.look()
            assert ended.is_set() or not [row for row in served.rows() if row[0] == "new"]
            await copier
            await served.repository.look()
            assert ("new", "1", "READY") in served.rows()

    in_loop(scenario)


def test_a_repository_that_vanishes_keeps_what_is_served(host: ModelHost, tmp_path: Path) -> None:
    root = tmp_path / "models"
    put(root, "a", 1, plus(1))

    async def scenario() -> None:
        async with serving(host, root, model_control="poll", poll_every=0.01) as served:
            assert await served.arun("a") == ("1", 1.0)
            root.rename(tmp_path / "away")
            with pytest.raises(OSError):
                await served.repository.look()
            assert await served.arun("a") == ("1", 1.0)
            (tmp_path / "away").rename(root)
            put(root, "b", 1, plus(2))
            await until(lambda: ("b", "1", "READY") in served.rows(), "the new model")
            (root / "a" / "1" / "model.onnx").unlink()
            (root / "a" / "1").rmdir()
            (root / "a").rmdir()
            await until(lambda: served.rows() == [("b", "1", "READY")], "the end of the old one")

    in_loop(scenario)


def test_a_warm_up_runs_before_the_model_is_served(host: ModelHost, tmp_path: Path) -> None:
    put(tmp_path, "a", 1, plus(1))
    warmup = 'model_warmup {{ name: "w" count: 3 inputs {{ key: "x" value {{ {} }} }} }}'
    configure(
        tmp_path,
        "a",
        warmup.format("data_type: TYPE_FP32 dims: 4 random_data: true")
        + 'parameters { key: "onnx_dl.eager" value { string_value: "true" } }',
    )
    put(tmp_path, "b", 1, plus(2))
    configure(tmp_path, "b", warmup.format('data_type: TYPE_FP32 dims: 4 input_data_file: "absent"'))

    async def scenario() -> None:
        async with serving(host, tmp_path) as served:
            await until(lambda: served.models.table.is_ready, "ready")
            # A run is counted a moment after its answer.
            await until(lambda: [each.runs for each in host.snapshot().models] == [3], "three runs")
            assert await served.arun("b") == ("1", 2.0)

    in_loop(scenario)


def test_without_memory_for_both_the_old_one_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Requests wait for the load then, and none fails."""
    monkeypatch.setenv("ONNX_DL_ROOM_TIMEOUT", "1")
    put(tmp_path, "a", 1, heavy(1, 5))
    configure(tmp_path, "a", 'parameters { key: "onnx_dl.pin" value { string_value: "true" } }')

    async def scenario(host: ModelHost) -> None:
        async with serving(host, tmp_path, model_control="poll") as served:
            async with Traffic(served, "a", threads=2) as traffic:
                put(tmp_path, "a", 2, heavy(2, 5))
                await served.repository.look()
                assert served.rows() == [("a", "2", "READY")]
                await traffic.more()
                put(tmp_path, "a", 3, heavy(3, 25))  # it never fits
                await served.repository.look()
                assert served.rows() == [("a", "2", "READY"), ("a", "3", "UNAVAILABLE")]
                assert "more than the limit" in served.row("a", "3").reason
                await traffic.more()
            assert not traffic.errors, traffic.errors[0]
            assert set(traffic.results) == {("1", 1.0), ("2", 2.0)}
        assert "there is no memory for the new and the old one at the same time" in caplog.text

    with ModelHost(memory_limit="75MB") as host:
        in_loop(lambda: scenario(host))


def heavy(added: int, millions: int) -> bytes:
    """A model with so many million weights, of which it needs one."""
    weights = np.full(millions * 1_000_000, added, np.float32)
    nodes = [
        zoo.node("Mul", ["x", "zero"], ["zeros"]),
        zoo.node("Cast", ["zeros"], ["places"], to=zoo.I64),
        zoo.node("Gather", ["w", "places"], ["added"]),
        zoo.node("Add", ["x", "added"], ["y"]),
    ]
    constants = [zoo.constant("w", weights), zoo.constant("zero", np.zeros(1, np.float32))]
    ends = [zoo.tensor(name, shape=["n"]) for name in "xy"]
    data: bytes = zoo.build(nodes, ends[:1], ends[1:], constants).SerializeToString()
    return data


@pytest.mark.parametrize("control", ["none", "poll"])
def test_a_file_that_is_overwritten_while_nobody_uses_it(
    host: ModelHost, tmp_path: Path, control: str
) -> None:
    """Its content need not fit what is known of the model: nothing runs in it if somebody follows it."""
    path = put(tmp_path, "a", 1, plus(1))

    async def scenario() -> None:
        async with serving(host, tmp_path, model_control=control) as served:
            assert await served.arun("a") == ("1", 1.0)
            await loads.free(host, served.models.find("a"))
            path.write_bytes(plus(5))
            if control == "poll":
                for _ in range(2):
                    with pytest.raises(FilesChanging, match="load the model again"):
                        await served.arun("a")
                await served.repository.look()
            assert await served.arun("a") == ("1", 5.0)

    in_loop(scenario)


def test_another_process_uses_the_worker_though_its_file_is_broken_by_now(
    host: ModelHost, tmp_path: Path
) -> None:
    """A second table stands for the process: it comes to the worker when the file has been replaced."""
    path = put(tmp_path, "a", 1, plus(1))

    async def scenario() -> None:
        async with serving(host, tmp_path) as served:
            assert await served.arun("a") == ("1", 1.0)
            path.unlink()
            path.write_bytes(b"no model")
            second = ModelTable(host)
            second.apply(served.models.table)
            with second.use("a") as used:
                (y,) = await used.proxy.arun(None, {"x": X})
                assert y[0] - X[0] == 1.0
            second.close()

    in_loop(scenario)
