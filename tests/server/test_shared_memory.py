"""Regions of shared memory: tritonclient in both protocols, and clients that do with them what they like."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np
import pytest
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException, serialize_byte_tensor

from tests.server.regions import (
    LARGE,
    PREFIX,
    SMALL,
    Client,
    both,
    closing_client,
    held,
    mixed_model,
    path,
    refused,
    region,
    text_model,
    worker,
)
from tests.support.serving import Serving, serving
from tests.support.slow import LONG, RUNS, identity_model, late_model
from tests.support.waiting import DEADLINE, allowed, eventually


@pytest.fixture(scope="module", params=["copy", "map"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    resource_tracker.ensure_running()  # tritonclient's helper starts this process, and keeps it
    folder = tmp_path_factory.mktemp("models")
    models = {"echo": identity_model(), "late": late_model(), "text": text_model(), "mixed": mixed_model()}
    arguments: list[str | Path] = ["--client-shm", request.param]
    if request.param == "copy":  # each process must know each region
        arguments += ["--processes", "2"]
    for name, data in models.items():
        (folder / f"{name}.onnx").write_bytes(data)
        arguments += ["--model", f"{name}={folder / name}.onnx"]
    with serving(*arguments) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Counts this process's files only: workers of the server come and go while it runs, and at its end
    :func:`serving` looks for what is left of it."""

    def mine() -> set[str]:
        found = {name for name in os.listdir("/dev/shm") if PREFIX in name}
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):
                found.add(os.readlink(f"/proc/self/fd/{fd}"))
        return {name for name in found if PREFIX in name}

    yield
    gc.collect()
    assert not mine()


@pytest.fixture(params=["http", "grpc"])
def client(server: Serving, request: pytest.FixtureRequest) -> Iterator[Client]:
    with closing_client(server, request.param) as made:
        yield made
        made.triton.unregister_system_shared_memory()


@pytest.fixture
def http(server: Serving) -> Iterator[Client]:
    with closing_client(server, "http") as made:
        yield made
        made.triton.unregister_system_shared_memory()


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_tensors_in_regions(client: Client, size: int) -> None:
    with both(client, 4 * size) as (given, out):
        for turn in range(4):
            x = np.arange(size, dtype=np.float32) + turn
            shm.set_shared_memory_region(given, [x])
            result = client.echo(size)
            found = result.get_output("y")
            shape = found["shape"] if isinstance(found, dict) else list(found.shape)
            assert [int(each) for each in shape] == [size]
            assert (shm.get_contents_as_numpy(out, np.float32, [size]) == x).all()


def test_a_part_of_a_region_and_one_side_only(client: Client) -> None:
    x = np.arange(LARGE, dtype=np.float32)
    with region(client, "in", 4 * LARGE + 8) as given:
        shm.set_shared_memory_region(given, [x], offset=4)
        given_x = client.module.InferInput("x", [LARGE], "FP32")
        given_x.set_shared_memory("in", 4 * LARGE, offset=4)
        assert (client.triton.infer("echo", [given_x]).as_numpy("y") == x).all()
        refused(lambda: client.echo(LARGE, offset=12, out="in"), "Invalid offset + byte size for")
        refused(lambda: client.echo(1, offset=4 * LARGE + 8, out="in"), "Invalid offset for")
        refused(lambda: client.echo(1, out="none"), "Unable to find shared memory region: 'none'",
                status="404 NOT_FOUND")  # fmt: skip
        plain = client.module.InferInput("x", [LARGE], "FP32")
        plain.set_data_from_numpy(x + 1)
        y = client.module.InferRequestedOutput("y")
        y.set_shared_memory("in", 4 * LARGE, offset=8)
        client.triton.infer("echo", [plain], outputs=[y])
        assert (shm.get_contents_as_numpy(given, np.float32, [LARGE], offset=8) == x + 1).all()


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_an_output_that_does_not_fit(client: Client, size: int) -> None:
    with both(client, 4 * size) as (given, out):
        shm.set_shared_memory_region(given, [np.ones(size, np.float32)])
        shm.set_shared_memory_region(out, [np.full(size, 7, np.float32)])
        for _ in range(3):
            words = f"({4 * size - 1} bytes) should be at least {4 * size} bytes to hold the results"
            refused(lambda: client.echo(size, room=4 * size - 1), "'y'", words)
        assert (shm.get_contents_as_numpy(out, np.float32, [size]) == 7).all()
        client.echo(size)
        assert (shm.get_contents_as_numpy(out, np.float32, [size]) == 1).all()


def test_text_in_regions(client: Client) -> None:
    text = np.array(["", "a", "é" * 5000], object)
    data = serialize_byte_tensor(text).item()
    with both(client, len(data) + 100) as (given, out):
        shm.set_shared_memory_region(given, [serialize_byte_tensor(text)])
        t = client.module.InferInput("t", [3], "BYTES")
        t.set_shared_memory("in", len(data))
        u = client.module.InferRequestedOutput("u")
        u.set_shared_memory("out", len(data) + 100)
        client.triton.infer("text", [t], outputs=[u])
        found = shm.get_contents_as_numpy(out, np.object_, [3])
        assert [each.decode() for each in found] == text.tolist()
        u.set_shared_memory("out", len(data) - 1)
        infer = functools.partial(client.triton.infer, "text", [t], outputs=[u])
        refused(infer, f"should be at least {len(data)} bytes")
        t.set_shared_memory("in", len(data) - 1)
        u.set_shared_memory("out", len(data))
        refused(infer)


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_type_that_numpy_lacks_beside_one_that_it_has(http: Client, size: int) -> None:
    with both(http, 6 * size) as (given, out):
        x = np.arange(size, dtype=np.float32)
        halves = (np.full(size, 1.5, np.float32).view(np.uint32) >> 16).astype(np.uint16)
        shm.set_shared_memory_region(given, [x, halves])
        tensors = [http.module.InferInput("x", [size], "FP32"), http.module.InferInput("b", [size], "BF16")]
        tensors[0].set_shared_memory("in", 4 * size)
        tensors[1].set_shared_memory("in", 2 * size, offset=4 * size)
        y = http.module.InferRequestedOutput("y")
        y.set_shared_memory("out", 4 * size)
        http.triton.infer("mixed", tensors, outputs=[y])
        assert (shm.get_contents_as_numpy(out, np.float32, [size]) == x + 1.5).all()


def test_names_and_keys(http: Client) -> None:
    triton = http.triton
    with region(http, "in", 64):
        refused(
            lambda: triton.register_system_shared_memory("in", f"/{PREFIX}-in", 64),
            "shared memory region 'in' already in manager", status="400 ALREADY_EXISTS",
        )  # fmt: skip
        refused(lambda: triton.register_system_shared_memory("b", f"/{PREFIX}-in", 65), "failed to register")
        refused(lambda: triton.register_system_shared_memory("b", f"/{PREFIX}-in", 1, offset=64))
        refused(lambda: triton.register_system_shared_memory("b", "/none-of-this-name", 64), "Unable to open")
        for key in ("/../etc/passwd", "/dev/null", "..", "/", "", "a/b"):
            refused(lambda key=key: triton.register_system_shared_memory("b", key, 8), "invalid shm key")
    triton.unregister_system_shared_memory("none")
    refused(
        lambda: triton.get_system_shared_memory_status("none"),
        "Unable to find system shared memory region: 'none'", status="404 NOT_FOUND",
    )  # fmt: skip


def test_what_is_no_shared_memory_of_this_user(http: Client) -> None:
    made = []
    try:
        os.symlink("/etc/hostname", path("link"))
        made.append("link")
        os.mkfifo(path("pipe"))
        made.append("pipe")
        os.mkdir(path("folder"))
        Path(path("other")).write_bytes(bytes(64))
        made.append("other")
        if os.geteuid() == 0:
            fd = os.open(path("other"), os.O_RDWR)
            os.fchown(fd, 12345, 12345)
            os.close(fd)
        else:
            os.chmod(path("other"), 0o400)
        for name in (*made, "folder"):
            key = f"/{PREFIX}-{name}"
            refused(lambda key=key: http.triton.register_system_shared_memory("b", key, 8), "Unable to open")
    finally:
        for name in made:
            os.unlink(path(name))
        os.rmdir(path("folder"))


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_client_that_truncates_its_file(server: Serving, http: Client, size: int) -> None:
    with both(http, 4 * size):
        http.echo(size)
        os.truncate(path("in"), 4 * size - 1)
        refused(lambda: http.echo(size))
        os.truncate(path("in"), 4 * size)
        os.truncate(path("out"), 0)
        refused(lambda: http.echo(size))
        assert os.stat(path("out")).st_size == 0, "a write has lengthened the client's file"
        os.truncate(path("out"), 4 * size)
        http.echo(size)


def test_a_client_that_truncates_its_file_during_the_run(server: Serving, http: Client) -> None:
    """Mapped: the worker ends, and the next request has another.  The server lives in any case."""
    with both(http, 4 * LARGE):
        http.late(LARGE, 1)
        mine = worker(server, "late")
        before = mine.cpu_times().user
        failures: list[BaseException] = []

        def run() -> None:
            try:
                with closing_client(server, "http") as other:
                    other.late(LARGE, int(LONG))
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        eventually(lambda: mine.cpu_times().user > before + RUNS, "the run")
        os.truncate(path("out"), 0)
        os.truncate(path("in"), 0)
        thread.join(allowed(2 * DEADLINE))
        assert not thread.is_alive()
        (failure,) = failures
        assert isinstance(failure, InferenceServerException)
        assert failure.status() in ("400", "500")  # 500: the worker has died of it
        os.truncate(path("in"), 4 * LARGE)
        os.truncate(path("out"), 4 * LARGE)
        assert http.triton.is_server_live()
        eventually(lambda: is_well(http), "the next worker")


def is_well(client: Client) -> bool:
    """False while the model waits, after its worker has died several times in a row."""
    try:
        client.late(LARGE, 1)
    except InferenceServerException as refused:
        assert refused.status() == "503", refused
        return False
    return True


def test_a_region_that_is_unregistered_while_it_is_used(server: Serving, http: Client) -> None:
    with both(http, 4 * LARGE) as (given, out):
        shm.set_shared_memory_region(given, [np.ones(LARGE, np.float32)])
        http.late(LARGE, 1)
        done = threading.Event()

        def run() -> None:
            with closing_client(server, "grpc") as other:
                other.late(LARGE, int(LONG))
            done.set()

        mine = worker(server, "late")
        before = mine.cpu_times().user
        thread = threading.Thread(target=run)
        thread.start()
        eventually(lambda: mine.cpu_times().user > before + RUNS, "the run")
        http.triton.unregister_system_shared_memory()
        refused(lambda: http.echo(LARGE), "Unable to find", status="404 NOT_FOUND")
        thread.join(allowed(2 * DEADLINE))
        assert done.is_set(), "a request that had begun did not finish"
        assert (shm.get_contents_as_numpy(out, np.float32, [LARGE]) == 2).all()


def test_many_requests_with_one_region(server: Serving, http: Client) -> None:
    count = 8
    with both(http, 4 * LARGE) as (given, out):
        part = LARGE // count

        def work(number: int) -> None:
            with closing_client(server, "http" if number % 2 else "grpc") as other:
                module = other.module
                for turn in range(10):
                    x = np.full(part, number + turn, np.float32)
                    shm.set_shared_memory_region(given, [x], offset=4 * part * number)
                    given_x = module.InferInput("x", [part], "FP32")
                    given_x.set_shared_memory("in", 4 * part, offset=4 * part * number)
                    y = module.InferRequestedOutput("y")
                    y.set_shared_memory("out", 4 * part, offset=4 * part * number)
                    other.triton.infer("echo", [given_x], outputs=[y])
                    found = shm.get_contents_as_numpy(out, np.float32, [part], offset=4 * part * number)
                    assert (found == x).all()

        with ThreadPoolExecutor(count) as threads:
            list(threads.map(work, range(count)))


def test_a_client_that_dies(server: Serving) -> None:
    """Its region stays registered, as in Triton, until somebody unregisters it."""
    program = (
        "import os, sys, tritonclient.http as http, tritonclient.utils.shared_memory as shm\n"
        "handle = shm.create_shared_memory_region('in', sys.argv[2], 64)\n"
        "http.InferenceServerClient(sys.argv[1]).register_system_shared_memory('in', sys.argv[2], 64)\n"
        "os._exit(0)"
    )
    try:
        command = [sys.executable, "-c", program, server.http, f"/{PREFIX}-dead"]
        subprocess.run(command, check=True, timeout=allowed(DEADLINE))
        with closing_client(server, "http") as client:
            assert client.triton.get_system_shared_memory_status()[0]["name"] == "in"
            client.echo(16, out="in")
            client.triton.unregister_system_shared_memory("in")
    finally:
        with contextlib.suppress(FileNotFoundError):  # Python's tracker of shared memory was faster
            os.unlink(path("dead"))


def test_nothing_is_left(server: Serving, http: Client) -> None:
    assert http.triton.get_system_shared_memory_status() is not None
    with both(http, 4 * LARGE):
        for _ in range(5):
            http.echo(LARGE)
        assert held(server) > 0
    # An idle lane gives its memories back within some seconds.
    eventually(lambda: held(server) == 0, "the end of the descriptors")
