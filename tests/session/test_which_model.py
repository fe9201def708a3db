"""Which model a proxy has: the files that it would find, whoever has loaded something of that name before."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_dl
from onnx_dl import EventType, InferenceSessionProxy, ModelHost
from onnx_dl.errors import FilesChanging
from onnx_dl.workers.load_cache.store import Cache
from tests.support.mlir import compiler
from tests.support.sharing import Forked, own_runtime
from tests.support.waiting import DEADLINE, allowed, eventually, wait_for, worker_pid
from tests.workers.test_load_cache import is_saved, maps, no_saver_is_left, store  # noqa: F401

pytestmark = pytest.mark.slow

CPU = ["CPUExecutionProvider"]
N = 4096
X = np.zeros(N, np.float32)


def graph(path: Path, location: str = "m.data") -> Path:
    """y = x + w, with w in a file beside it."""
    weights = numpy_helper.from_array(np.zeros(N, np.float32), "w")
    made = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [N])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [N])],
        [weights],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    where = path.parent / location
    onnx.save(model, path, save_as_external_data=True, location=location, size_threshold=1024)
    where.unlink()
    return path


def weights(path: Path, value: float) -> Path:
    np.full(N, value, np.float32).tofile(path)
    return path


def answer(proxy: InferenceSessionProxy) -> float:
    (found,) = proxy.run(None, {"x": X})
    assert len(set(found)) == 1
    return float(found[0])


@pytest.fixture(params=["private", "shared"])
def host(
    request: pytest.FixtureRequest, nothing_is_left_behind: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModelHost]:
    if request.param == "private":
        with ModelHost() as host:
            yield host
    else:
        with own_runtime(monkeypatch):
            yield onnx_dl.connect("mine")


# --- how files change ------------------------------------------------------------------------------------


def by_rename(folder: Path) -> None:
    os.replace(weights(folder / "new", 2), folder / "m.data")


def in_place(folder: Path) -> None:
    os.utime(weights(folder / "m.data", 2), ns=(0, 0))


def by_link(folder: Path) -> None:
    (folder / "link").symlink_to(weights(folder / "two", 2))
    os.replace(folder / "link", folder / "m.data")


def of_a_model_that_is_replaced(folder: Path) -> None:
    os.replace(graph(folder / "other.onnx", "other.data"), folder / "m.onnx")
    weights(folder / "other.data", 2)


CHANGES = [by_rename, in_place, by_link, of_a_model_that_is_replaced]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Its weights, all 1, are behind a link."""
    folder = tmp_path / "model"
    folder.mkdir()
    made = graph(folder / "m.onnx")
    (folder / "m.data").symlink_to(weights(folder / "one", 1))
    return made


@pytest.mark.parametrize("change", CHANGES)
def test_new_proxies_get_what_is_there_and_older_ones_keep_theirs(
    host: ModelHost, path: Path, change: Callable[[Path], None]
) -> None:
    older = host.open(path, providers=CPU)
    assert answer(older) == 1
    change(path.parent)
    newer = [host.open(path, providers=CPU) for _ in range(3)]
    assert [answer(proxy) for proxy in newer] == [2, 2, 2]
    # onnxruntime maps weights: who writes to the very file changes them in a session that has it.
    assert answer(older) == 1 or change is in_place
    assert len({status.pid for status in host.snapshot().models if status.pid}) == 2
    older.unload()
    assert [answer(proxy) for proxy in (older, *newer)] == [2] * 4


def test_a_link_that_goes_to_and_fro(host: ModelHost, path: Path) -> None:
    """While each version is in use, and one is named after files that its load did not find any more."""
    weights(path.parent / "two", 2)

    def point_to(name: str) -> None:
        (path.parent / "link").symlink_to(name)
        os.replace(path.parent / "link", path.parent / "m.data")

    kept = []
    for name, value in [("one", 1), ("two", 2), ("one", 1), ("two", 2), ("one", 1)]:
        point_to(name)
        kept.append(host.open(path, providers=CPU))
        assert answer(kept[-1]) == value
    assert [answer(proxy) for proxy in kept] == [1, 2, 1, 2, 1]
    assert len(loaded(host)) == 2
    for proxy in kept:
        proxy.unload()
    point_to("two")
    assert [answer(proxy) for proxy in kept] == [2] * 5
    point_to("one")
    newer = host.open(path, providers=CPU)
    assert [answer(newer), answer(kept[0]), answer(kept[1])] == [1, 2, 2]


def test_another_application_gets_what_is_there(
    nothing_is_left_behind: None, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    with own_runtime(monkeypatch):
        host = onnx_dl.connect("mine")
        older = host.open(path, providers=CPU)
        assert answer(older) == 1
        by_rename(path.parent)
        other = Forked(lambda: answer(onnx_dl.connect("mine").open(path, providers=CPU)))
        assert (other.result(), answer(older)) == (2, 1)


def test_two_links_to_one_file_beside_weights_of_their_own(host: ModelHost, tmp_path: Path) -> None:
    """As the cache of a hub has two revisions of one graph."""
    shared = graph(tmp_path / "graph")
    for revision in (1, 2):
        folder = tmp_path / f"snapshot{revision}"
        folder.mkdir()
        (folder / "m.onnx").symlink_to(shared)
        (folder / "m.data").symlink_to(weights(tmp_path / f"blob{revision}", revision))
    proxies = [host.open(tmp_path / f"snapshot{n}" / "m.onnx", providers=CPU) for n in (1, 2)]
    assert [answer(proxy) for proxy in proxies] == [1, 2]


def test_a_folder_that_was_another_when_the_model_loaded(host: ModelHost, path: Path, tmp_path: Path) -> None:
    """Two paths to one file, of which one leads elsewhere by the time that its proxy loads."""
    folder = tmp_path / "now"
    folder.symlink_to(path.parent)
    by_link_to_folder = host.open(folder / "m.onnx", providers=CPU)
    plain = host.open(path, providers=CPU)
    other = tmp_path / "other"
    other.mkdir()
    graph(other / "m.onnx")
    weights(other / "m.data", 2)
    (tmp_path / "next").symlink_to(other)
    os.replace(tmp_path / "next", folder)
    assert [answer(by_link_to_folder), answer(plain)] == [2, 1]


def test_a_model_given_as_bytes(host: ModelHost, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights lie where the program is."""
    monkeypatch.chdir(path.parent)
    data = path.read_bytes()
    older = host.open(data, providers=CPU)
    assert answer(older) == 1
    by_rename(path.parent)
    assert [answer(host.open(data, providers=CPU)), answer(older)] == [2, 1]


@pytest.mark.filterwarnings("ignore:This SessionOptions was made before")
def test_a_library_of_custom_operators(host: ModelHost, path: Path, tmp_path: Path) -> None:
    source = "void *RegisterCustomOps(void *options, const void *api) { return 0; }\n"
    (tmp_path / "ops.c").write_text(source)
    library = compile_library(tmp_path / "ops.c", tmp_path / "ops.so")

    def opened() -> InferenceSessionProxy:
        given = onnxruntime.SessionOptions()
        given.register_custom_ops_library(str(library))
        return host.open(path, given, providers=CPU)

    older = opened()
    assert answer(older) == 1
    assert [answer(opened()), len(loaded(host))] == [1, 1]
    shutil.copy(library, tmp_path / "ops.new")
    os.replace(tmp_path / "ops.new", library)
    newer = opened()
    assert [answer(newer), answer(older), len(loaded(host))] == [1, 1, 2]


def compile_library(source: Path, target: Path) -> Path:
    command = shutil.which("cc") or shutil.which("gcc") or pytest.skip("no C compiler")
    assert os.spawnl(os.P_WAIT, command, command, "-shared", "-fPIC", "-o", str(target), str(source)) == 0
    return target


def loaded(host: ModelHost) -> list[int]:
    return [status.pid for status in host.snapshot().models if status.pid is not None]


def test_a_compiled_model_that_is_replaced(host: ModelHost, tmp_path: Path) -> None:
    build = compiler(tmp_path)
    path, other = build("add"), build("identity")
    older = onnx_dl.ExecutionSession(path, host=host)
    older.load()
    shutil.copy(other, tmp_path / "new")
    os.replace(tmp_path / "new", path)
    newer = onnx_dl.ExecutionSession(path, host=host)
    newer.load()
    assert len(loaded(host)) == 2


# --- what is told, and who stays -------------------------------------------------------------------------


def test_an_event_and_a_warning_once_for_each_worker(
    host: ModelHost, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with host.events() as events:
        older = host.open(path, providers=CPU)
        answer(older)
        pid = worker_pid(host)
        by_rename(path.parent)
        newer = [host.open(path, providers=CPU) for _ in range(2)]
        assert [answer(proxy) for proxy in newer] == [2, 2]
        event = wait_for(events, EventType.OUTDATED)
        assert (event.pid, event.detail) == (pid, str(path.parent / "m.data"))
        older.unload()
        answer(older)
        while (event := events.get(allowed(DEADLINE))).type != EventType.READY or event.pid == pid:
            assert event.type != EventType.OUTDATED
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "m.data has changed since it was loaded" in record.getMessage()


def test_a_worker_that_only_older_proxies_used_goes_with_them(host: ModelHost, path: Path) -> None:
    older = host.open(path, providers=CPU)
    answer(older)
    pid = worker_pid(host)
    by_rename(path.parent)
    newer = host.open(path, providers=CPU)
    assert answer(newer) == 2
    older.close()
    eventually(lambda: pid not in loaded(host), "the outdated worker goes")
    assert answer(host.open(path, providers=CPU)) == 2


def test_metadata_of_a_model_that_is_not_loaded_loads_nothing(host: ModelHost, path: Path) -> None:
    proxy = host.open(path, providers=CPU)
    answer(proxy)
    proxy.unload()
    assert proxy.get_inputs()[0].name == host.open(path, providers=CPU).get_inputs()[0].name == "x"
    assert not loaded(host)
    by_rename(path.parent)
    assert host.open(path, providers=CPU).get_inputs()[0].name == "x"
    assert len(loaded(host)) == 1, "what the old one said need not hold"


def test_metadata_alone_is_a_use(host: ModelHost, path: Path) -> None:
    proxy = host.open(path, providers=CPU, ttl=0.2)
    with host.events() as events:
        assert proxy.get_inputs()[0].name == "x"
        assert wait_for(events, EventType.UNLOADED).reason == "ttl"


def test_inside_of_a_block_that_holds_the_old_one(host: ModelHost, path: Path) -> None:
    older = host.open(path, providers=CPU)
    with older.session():
        assert answer(older) == 1
        same = host.open(path, providers=CPU)
        assert answer(same) == 1
        by_rename(path.parent)
        newer = host.open(path, providers=CPU)
        assert [answer(newer), answer(same), answer(older)] == [2, 1, 1]


def test_many_threads_of_one_new_proxy(host: ModelHost, path: Path) -> None:
    older = host.open(path, providers=CPU)
    assert answer(older) == 1
    by_rename(path.parent)
    newer, found = host.open(path, providers=CPU), []
    threads = [threading.Thread(target=lambda: found.append(answer(newer))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (found, answer(older)) == ([2] * 8, 1)


def test_coroutines_of_a_new_proxy(host: ModelHost, path: Path) -> None:
    import asyncio

    older = host.open(path, providers=CPU)
    assert answer(older) == 1
    by_rename(path.parent)

    async def main() -> list[float]:
        newer = host.open(path, providers=CPU)
        found = await asyncio.gather(*[newer.arun(None, {"x": X}) for _ in range(4)])
        return [float(result[0][0]) for result in found]

    assert asyncio.run(main()) == [2] * 4


def test_a_group_loads_what_is_there_for_its_new_member(host: ModelHost, path: Path) -> None:
    older = host.open(path, providers=CPU, group="g")
    assert answer(older) == 1
    by_rename(path.parent)
    newer = host.open(path, providers=CPU, group="g")
    assert answer(newer) == 2
    assert answer(older) == 2, "its worker was replaced, for all members"
    assert len(loaded(host)) == 1


def test_a_model_that_changes_each_time_that_it_is_loaded(
    nothing_is_left_behind: None, tmp_path: Path
) -> None:
    path = graph(tmp_path / "m.onnx")
    weights(tmp_path / "m.data", 1)
    with ModelHost() as host:
        proxy = host.open(path, providers=CPU)
        stop = threading.Event()

        def churn() -> None:
            while not stop.is_set():
                os.replace(weights(tmp_path / "new", 1), tmp_path / "m.data")

        churning = threading.Thread(target=churn)
        churning.start()
        try:
            with pytest.raises(FilesChanging, match=r"m\.data (was changed|is not the file)"):
                for _ in range(100):  # on a busy machine the other thread may be late for one load
                    proxy.load()
                    proxy.unload()
        finally:
            stop.set()
            churning.join()
        assert answer(proxy) == 1


# --- the load cache --------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A model that is worth saving: y = x W, and W in a file behind a link."""
    folder = tmp_path / "large"
    folder.mkdir()
    width = 1536
    made = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", width])],
        [numpy_helper.from_array(np.zeros((width, width), np.float32), "w")],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=1024)
    for value in (1, 2):
        (np.eye(width, dtype=np.float32) * value).tofile(folder / f"w{value}")
    os.unlink(folder / "m.data")
    (folder / "m.data").symlink_to("w1")
    return folder


def factor(path: Path) -> tuple[float, int]:
    """What a program of its own gets, and its worker's process id was, as long as that was there."""
    with ModelHost() as host:
        proxy = host.open(path, providers=CPU)
        (found,) = proxy.run(None, {"x": np.ones((1, 1536), np.float32)})
        mapped = maps(worker_pid(host), Path(os.environ["ONNX_DL_CACHE_DIR"]))
        no_saver_is_left(host)
        return float(found[0, 0]), mapped


def test_a_link_that_is_set_to_another_file_between_two_programs(store: Cache, large: Path) -> None:  # noqa: F811
    assert factor(large / "m.onnx") == (1, False)
    is_saved(store)
    assert factor(large / "m.onnx") == (1, True)
    (large / "next").symlink_to("w2")
    os.replace(large / "next", large / "m.data")
    assert factor(large / "m.onnx") == (2, False)
    assert factor(large / "m.onnx") == (2, True)
    (large / "next").symlink_to("w1")
    os.replace(large / "next", large / "m.data")
    assert factor(large / "m.onnx") == (1, False)


def test_two_revisions_have_two_entries(store: Cache, large: Path, tmp_path: Path) -> None:  # noqa: F811
    for revision in (1, 2):
        (tmp_path / f"s{revision}").mkdir()
        (tmp_path / f"s{revision}" / "m.onnx").symlink_to(large / "m.onnx")
        (tmp_path / f"s{revision}" / "m.data").symlink_to(large / f"w{revision}")
    for is_mapped in (False, True):
        found = [factor(tmp_path / f"s{revision}" / "m.onnx") for revision in (1, 2)]
        assert found == [(1, is_mapped), (2, is_mapped)]


def test_an_entry_is_not_used_by_a_proxy_that_would_find_others(store: Cache, large: Path) -> None:  # noqa: F811
    """Within one host, whose older proxy keeps what it has."""
    with ModelHost() as host:
        ones = {"x": np.ones((1, 1536), np.float32)}
        older = host.open(large / "m.onnx", providers=CPU)
        assert older.run(None, ones)[0][0, 0] == 1
        is_saved(store)
        no_saver_is_left(host)
        (large / "next").symlink_to("w2")
        os.replace(large / "next", large / "m.data")
        newer = host.open(large / "m.onnx", providers=CPU)
        assert [newer.run(None, ones)[0][0, 0], older.run(None, ones)[0][0, 0]] == [2, 1]
        no_saver_is_left(host)


# --- and how it runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["fork", "exec"])
@pytest.mark.parametrize("group", [None, "g"])
def test_denormals_are_flushed_as_in_process(
    nothing_is_left_behind: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    start: str,
    group: str | None,
) -> None:
    """onnxruntime heeds this for the first session of a process, in the thread that makes it."""
    monkeypatch.setenv("ONNX_DL_START", start)
    path = halves(tmp_path / "m.onnx")
    tiny = {"x": np.full(4, 1.2e-38, np.float32)}
    given = onnxruntime.SessionOptions()
    given.add_session_config_entry("session.set_denormal_as_zero", "1")
    code = (  # in a process that has made no session before
        "import sys, numpy as np, onnxruntime; given = onnxruntime.SessionOptions(); "
        "given.add_session_config_entry('session.set_denormal_as_zero', '1'); "
        "session = onnxruntime.InferenceSession(sys.argv[1], given, providers=['CPUExecutionProvider']); "
        "print(session.run(None, {'x': np.full(4, 1.2e-38, np.float32)})[0].tolist())"
    )
    fresh = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60)
    with ModelHost() as host:
        proxy = host.open(path, given, providers=CPU, group=group)
        plain = host.open(path, providers=CPU)
        assert fresh.stdout.strip() == "[0.0, 0.0, 0.0, 0.0]"
        for _ in range(3):  # prepared calls, too
            assert proxy.run(None, tiny)[0].tolist() == [0] * 4
            assert all(value > 0 for value in plain.run(None, tiny)[0])


def halves(path: Path) -> str:
    made = helper.make_graph(
        [helper.make_node("Mul", ["x", "c"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
        [numpy_helper.from_array(np.float32([0.5]), "c")],
    )
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return str(path)
