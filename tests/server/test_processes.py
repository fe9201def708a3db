"""``onnx-dl serve --processes``: any request may come to any process, and each of them may die."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from onnx_dl.demo.assets import load_samples, model_path
from tests.server.test_serve import Slow, ask, host_pid, infer, rows, turns
from tests.support.serving import Serving, serving
from tests.support.slow import spin_model
from tests.support.waiting import DEADLINE, allowed, eventually

PROCESSES = 3
TIMES = 24
"""Connections after which each of three processes has had one: else with a probability of 1 in 10000."""
DIGITS = str(model_path("digits"))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    for name, content in (("digits", Path(DIGITS).read_bytes()), ("slow", spin_model())):
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "1" / "model.onnx").write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def many(repository: Path) -> Iterator[Serving]:
    words = ["--repository", repository, "--model-control", "explicit", "--load-model", "*"]
    with serving(*words, "--processes", str(PROCESSES), "--client-shm", "copy") as server:
        yield server


def children(server: Serving) -> list[psutil.Process]:
    """The processes of a server beside the first one."""
    found = psutil.Process(server.pid).children()
    return [each for each in found if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def statuses(server: Serving, path: str, body: Any = None) -> set[int]:
    """Statuses of many requests, each on a connection of its own, so that all processes get some."""
    return {ask(server, path, body).status for _ in range(TIMES)}


def listeners(address: str) -> set[str]:
    """Inodes of the sockets that listen at an address of loopback."""
    port = f"{int(address.rpartition(':')[2]):04X}"
    lines = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()
    ]
    return {line[9] for line in lines if line[1].endswith(f":{port}") and line[3] == "0A"}


def successes(server: Serving) -> int:
    """Inferences of digits that succeeded, in all processes."""
    (stats,) = ask(server, "/v2/models/digits/stats").json["model_stats"]
    return int(stats["inference_stats"]["success"]["count"])


# --- one server -------------------------------------------------------------------------------------------


def test_all_processes_listen_at_the_same_addresses(many: Serving) -> None:
    assert len(children(many)) == PROCESSES - 1
    assert len(listeners(many.http)) == PROCESSES
    assert len(listeners(many.grpc)) == PROCESSES


def test_requests_come_to_all_and_are_counted_together(many: Serving) -> None:
    before = successes(many)
    for done in range(1, TIMES + 1):
        assert infer(many, "digits").status == 200
        assert successes(many) == before + done, "at once, whichever process answers"
    text = ask(many, "/metrics").body.decode()
    assert f'nv_inference_request_success{{model="digits",version="1"}} {before + TIMES}.0' in text
    busy = [psutil.Process(many.pid), *children(many)]
    assert all(sum(each.cpu_times()[:2]) > 0 for each in busy)


def test_an_unload_and_a_load_are_seen_by_all_at_once(many: Serving) -> None:
    for _ in range(3):
        assert ask(many, "/v2/repository/models/digits/unload", {}).status == 200
        assert statuses(many, "/v2/models/digits/ready") == {400}
        assert statuses(many, "/v2/models/digits/infer", rows("digits")) == {404}
        assert ask(many, "/v2/repository/models/digits/load", {}).status == 200
        assert statuses(many, "/v2/models/digits/ready") == {200}
    assert infer(many, "digits").status == 200


def test_a_region_is_seen_by_all_at_once(many: Serving, tmp_path: Path) -> None:
    samples = load_samples()["digits"].inputs[:1]
    key = f"odl_processes_{os.getpid()}"  # no name that other tests take for one of ours
    path = Path("/dev/shm") / key
    path.write_bytes(samples.tobytes())
    region = {"key": f"/{key}", "offset": 0, "byte_size": samples.nbytes}
    parameters = {"shared_memory_region": "given", "shared_memory_byte_size": samples.nbytes}
    tensor = {
        "name": load_samples()["digits"].input_name, "shape": samples.shape, "datatype": "FP32",
        "parameters": parameters,
    }  # fmt: skip
    body = {"inputs": [tensor]}
    try:
        for _ in range(3):
            assert ask(many, "/v2/systemsharedmemory/region/given/register", region).status == 200
            answers = [infer(many, "digits", body) for _ in range(TIMES)]
            assert {answer.status for answer in answers} == {200}, answers[0].body
            assert {ask(many, "/v2/systemsharedmemory/status").json[0]["name"] for _ in range(TIMES)} == {
                "given"
            }
            assert ask(many, "/v2/systemsharedmemory/region/given/register", region).status == 400
            assert ask(many, "/v2/systemsharedmemory/region/given/unregister", {}).status == 200
            assert statuses(many, "/v2/models/digits/infer", body) == {404}
    finally:
        path.unlink()


def test_a_refusal_of_the_first_process_is_the_same_from_all(many: Serving) -> None:
    said = {ask(many, "/v2/repository/models/nobody/load", {}).body for _ in range(TIMES)}
    assert len(said) == 1 and b"failed to load" in said.pop()
    assert statuses(many, "/v2/repository/models/nobody/load", {}) <= {400, 404, 503}


def test_the_extension_is_claimed_with_these_options(many: Serving) -> None:
    found = {tuple(ask(many, "/v2").json["extensions"]) for _ in range(TIMES)}
    assert len(found) == 1 and {"system_shared_memory", "model_repository"} <= set(found.pop())


# --- one of them dies -------------------------------------------------------------------------------------


def work(server: Serving, stop: threading.Event, failed: list[int]) -> None:
    """Makes requests until ``stop``, and notes the statuses of those that failed."""
    while not stop.is_set():
        if (answer := infer(server, "digits")).status != 200:
            failed.append(answer.status)


def await_children(server: Serving, gone: set[int], count: int = PROCESSES) -> None:
    """Returns when all processes listen, none of which is ``gone``."""
    eventually(
        lambda: not gone & {child.pid for child in children(server)} and len(listeners(server.http)) == count,
        "other children, which listen",
        4 * DEADLINE,
    )


def test_children_that_die_or_hang_are_replaced(repository: Path) -> None:
    with serving("--repository", repository, "--processes", str(PROCESSES)) as server:
        statuses(server, "/v2/models/digits/infer", rows("digits"))
        eventually(lambda: age(children(server)[-1]) > 5.5, "children that have lived for a while")
        stop = threading.Event()
        failed: list[int] = []
        threads = [threading.Thread(target=work, args=(server, stop, failed)) for _ in range(3)]
        for thread in threads:
            thread.start()
        killed, hanging = children(server)
        killed.send_signal(signal.SIGKILL)
        await_children(server, {killed.pid})
        stop.set()
        for thread in threads:
            thread.join(allowed(DEADLINE))
        # Only connections that were in its hands, or waited for it, are lost.
        assert set(failed) <= {0} and len(failed) <= len(threads)
        hanging.suspend()
        await_children(server, {hanging.pid})
        assert statuses(server, "/v2/models/digits/infer", rows("digits")) == {200}


def test_a_dead_childs_counts_stay_and_its_places_are_free(repository: Path) -> None:
    words = ["--repository", repository, "--processes", "2", "--max-queue-size", "3"]
    with serving(*words) as server:
        statuses(server, "/v2/models/digits/infer", rows("digits"))
        before = successes(server)
        running = [Slow(server, 1 << 40, loads=not number) for number in range(3)]
        eventually(lambda: pending_count(server) == 3, "three requests that run")
        assert statuses(server, "/v2/models/slow/infer", turns(1)) == {429}, "in all processes"
        (child,) = children(server)
        child.send_signal(signal.SIGKILL)
        eventually(lambda: not child.is_running(), "its end")
        eventually(lambda: successes(server) >= before, "its counts")

        def left() -> int:
            """Requests that the first process has: the others have noticed the end of their connections."""
            return sum(each.answer is None for each in running)

        eventually(lambda: pending_count(server) == left(), "no request of a dead child that is counted")
        # Its places are free: in one of eight runs of this test it had none.
        expected = 429 if left() == 3 else 200
        eventually(lambda: ask(server, "/v2/models/slow/infer", turns(1)).status == expected, "free places")
        server.end(signal.SIGKILL)
        for each in running:
            each.wait()


def age(process: psutil.Process) -> float:
    return time.time() - process.create_time()


def pending_count(server: Serving) -> int:
    text = ask(server, "/metrics").body.decode()
    (found,) = re.findall(r'^nv_inference_pending_request_count{model="slow".*} (\S+)$', text, re.MULTILINE)
    return int(float(found))


def test_the_host_dies_and_all_processes_go_on(many: Serving) -> None:
    first = host_pid(many)
    assert first is not None
    os.kill(first, signal.SIGKILL)
    eventually(lambda: host_pid(many) not in (None, first), "the next host")

    def all_answer() -> bool:
        return statuses(many, "/v2/models/digits/infer", rows("digits")) == {200}

    eventually(all_answer, "answers of all processes", 60)
    assert statuses(many, "/v2/health/ready") == {200}


def test_grpc_comes_to_all_processes_too(many: Serving) -> None:
    """Each client with a connection of its own."""
    grpcclient = pytest.importorskip("tritonclient.grpc")
    before = successes(many)
    samples = load_samples()["digits"]
    given = grpcclient.InferInput(samples.input_name, [1, samples.inputs.shape[1]], "FP32")
    given.set_data_from_numpy(samples.inputs[:1])
    for number in range(1, 9):
        alone = [("grpc.use_local_subchannel_pool", 1)]
        with grpcclient.InferenceServerClient(many.grpc, channel_args=alone) as client:
            assert client.is_server_ready()
            client.unload_model("slow")
            client.load_model("slow")
            result = client.infer("digits", [given])
            assert result.as_numpy("label").tolist() == [samples.targets[0]]
            (stats,) = client.get_inference_statistics("digits").model_stats
            assert stats.inference_stats.success.count == before + number


# --- the end ----------------------------------------------------------------------------------------------


def test_a_drain_lets_all_processes_finish(repository: Path) -> None:
    with serving("--repository", repository, "--processes", "2") as server:
        running = [Slow(server, 20_000, loads=not number) for number in range(4)]

        def begun() -> int:
            """Requests that have come to the server, at least."""
            answered = sum(each.answer is not None for each in running)
            return answered + pending_count(server)

        eventually(lambda: begun() >= len(running), "all requests")
        assert server.end() == 0
        assert {each.wait().status for each in running} == {200}


def test_the_first_process_is_killed_and_nothing_is_left(repository: Path) -> None:
    with serving("--repository", repository, "--processes", "2") as server:
        running = Slow(server, 1 << 40)
        server.end(signal.SIGKILL)
        assert running.wait().status == 0
    # serving() has waited until children, host and workers were gone.
