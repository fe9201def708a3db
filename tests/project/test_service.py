"""The service in examples/service: a real server, real HTTP, and its end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import psutil
import pytest

from tests.support.waiting import DEADLINE, allowed, eventually

pytestmark = pytest.mark.slow

for needed in ("fastapi", "uvicorn", "multipart", "PIL"):
    pytest.importorskip(needed, reason="the service needs the packages of the extra dev")
httpx = pytest.importorskip("httpx", reason="the service needs the packages of the extra dev")

ROOT = Path(__file__).parents[2]
SERVICE = ROOT / "examples" / "service"
MODELS = ("detector.onnx", "reader.onnx")
LIMIT = 256_000_000


@pytest.fixture(scope="module")
def measuring() -> Iterator[Any]:
    """The module ``measuring`` of the service."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SERVICE))
        import measuring  # type: ignore[import-not-found, unused-ignore]

        yield measuring
    for name in (set(sys.modules) - before) & {"measuring", "frames", "images"}:
        del sys.modules[name]


def listening(log: Path) -> str:
    """The URL that uvicorn says it serves."""
    found: list[str] = []

    def says() -> bool:
        found[:] = re.findall(r"running on (http://\S+)", log.read_text())
        return bool(found)

    eventually(says, "the start of the service", 6 * DEADLINE)
    return found[0]


@contextlib.contextmanager
def served(folder: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[bytes], Any]]:
    """The service at a free port, and a client of it."""
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "app:app", "--port", "0"],
            cwd=SERVICE,
            env=os.environ | {"ONNX_DL_MEMORY_LIMIT": str(LIMIT), **environment},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        with httpx.Client(base_url=listening(log), timeout=allowed(4 * DEADLINE)) as client:
            yield process, client
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(allowed(DEADLINE))


def files(frames: list[Any]) -> list[Any]:
    from frames import encode  # type: ignore[import-not-found, unused-ignore]

    return [("files", (f"{n}.png", encode(frame, "PNG"), "image/png")) for n, frame in enumerate(frames)]


def detections(answer: Any) -> list[Any]:
    assert answer.status_code == 200, answer.text
    return [frame["detections"] for frame in answer.json()["frames"]]


def value(page: str, sample: str) -> float:
    """The value of the sample whose line begins so."""
    (found,) = re.findall(rf"^{re.escape(sample)} (\S+)$", page, re.MULTILINE)
    return float(found)


def test_the_models_are_as_good_as_their_metadata_says(measuring: Any) -> None:
    """On a part of the frames that the metadata is about, so with some tolerance."""
    find, read = (onnxruntime.InferenceSession(str(SERVICE / "models" / name)) for name in MODELS)
    said = find.get_modelmeta().custom_metadata_map | read.get_modelmeta().custom_metadata_map
    frames = measuring.held_out_frames(50)
    seen = measuring.measure(find, frames)
    measured = {
        "precision": seen.precision,
        "recall": seen.recall,
        "accuracy": measuring.reading_accuracy(find, read, frames),
    }
    assert measured == pytest.approx({name: float(said[f"held_out_{name}"]) for name in measured}, abs=0.03)
    assert min(seen.precision, seen.recall) > 0.9
    figures = " ".join((SERVICE / "README.md").read_text().split())
    digits = f"{said['held_out_frames']} frames with {said['held_out_digits']} digits"
    assert digits in figures
    for name in ("precision", "recall"):
        assert f"{name} {float(said[f'held_out_{name}']):.2f}" in figures
    assert f"{100 * float(said['held_out_accuracy']):.0f} % of the detected digits" in figures


def test_the_service(measuring: Any, tmp_path: Path) -> None:
    """One server for all: its start takes longer than the rest."""
    frames = measuring.held_out_frames(6)
    with served(tmp_path) as (process, client):
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        together = detections(client.post("/detect", files=files(frames)))
        finds_the_digits(client, frames, together, measuring)
        refuses_what_it_cannot_use(client, files(frames)[0])
        outlives_its_detector(client, frames, together)
        page = client.get("/metrics").text
        assert value(page, "service_frames_total") == 3 * len(frames)
        assert value(page, 'service_requests_total{path="/detect",status="504"}') == 1
        assert value(page, "onnx_dl_memory_limit_bytes") == LIMIT
        (loads,) = re.findall(r'^onnx_dl_loads_total\{model="detector.onnx",.*\} (\S+)$', page, re.MULTILINE)
        assert float(loads) == 2
        bounds_the_memory_of_a_burst(client, files(frames + frames))
        ends_after_the_last_request(process, client, files(frames)[:1])
        assert "Application shutdown complete" in (tmp_path / "log").read_text()
        eventually(lambda: not any(child.is_running() for child in children), "the end of the workers")


def finds_the_digits(client: Any, frames: list[Any], together: list[Any], measuring: Any) -> None:
    """All frames at once and one by one: equal detections, at the digits."""
    alone = [detections(client.post("/detect", files=[one]))[0] for one in files(frames)]
    places = [[found["box"] for found in frame] for frame in together]
    assert places == [[found["box"] for found in frame] for frame in alone]
    hits = sum(
        measuring.matched(np.array(boxes, np.float32).reshape(-1, 4), np.ones(len(boxes)), frame.boxes)
        for boxes, frame in zip(places, frames, strict=True)
    )
    assert hits >= 0.85 * sum(len(frame.boxes) for frame in frames)


def refuses_what_it_cannot_use(client: Any, file: Any) -> None:
    assert client.post("/detect", files={"files": b"text"}).status_code == 422
    assert client.post("/detect", files={"files": file[1][1][:2000]}).status_code == 422
    assert client.post("/detect", content=iter([b"chunk"])).status_code == 411
    too_many = [("files", ("empty", b"", "image/png"))] * 40
    assert client.post("/detect", files=too_many).status_code == 422


def outlives_its_detector(client: Any, frames: list[Any], together: list[Any]) -> None:
    """A worker that hangs costs its request; one that dies, nobody: the next request loads the model."""

    def worker() -> Any:
        return psutil.Process(detector_of(client.get("/models").json())["pid"])

    detector = worker()
    detector.suspend()
    late = client.post("/detect?timeout=1", files=files(frames[:1]))
    assert (late.status_code, late.json()["error"].split(":")[0]) == (504, "RunTimeout")
    detector.kill()
    eventually(lambda: client.get("/readyz").status_code == 200, "another worker")
    assert worker().pid != detector.pid
    assert detections(client.post("/detect", files=files(frames))) == together


def detector_of(snapshot: Any) -> Any:
    (detector,) = [model for model in snapshot["models"] if model["model"].endswith("detector.onnx")]
    return detector


def bounds_the_memory_of_a_burst(client: Any, posted: list[Any]) -> None:
    """Runs at a time, frames of each, and so memory. Times do not matter: on a busy machine some requests
    wait too long for their turn, and are told so."""
    looks: list[Any] = []
    with ThreadPoolExecutor(6) as pool:
        paths = ["/detect", "/detect", "/quality"] * 2
        answers = [pool.submit(client.post, path, files=posted) for path in paths]
        while not all(answer.done() for answer in answers):
            looks.append(client.get("/models").json())
    done = [answer.result() for answer in answers]
    statuses = {answer.status_code for answer in done}
    assert statuses <= {200, 503, 504} and 200 in statuses
    found = [answer.json() for answer in done if answer.status_code == 200]
    sizes = {frame["batch"] for answer in found for frame in answer["frames"] if "batch" in frame}
    assert sizes <= {4}
    assert max(detector_of(look)["busy"] for look in looks) <= 2
    # About 150 MB. Not memory_in_use: it has reservations for loads, and these may use the limit up.
    used = [sum(model["usage"]["pss"] for model in look["models"] if model["usage"]) for look in looks]
    assert 0 < max(used) <= LIMIT


def ends_after_the_last_request(process: subprocess.Popen[bytes], client: Any, posted: list[Any]) -> None:
    """SIGTERM in the middle of a request: it is answered, new ones are not accepted."""
    request = client.build_request("POST", "/detect", files=posted)
    body = request.read()
    port = client.base_url.port
    with socket.create_connection(("127.0.0.1", port), timeout=allowed(DEADLINE)) as slow:
        head = f"POST /detect HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        slow.sendall(f"{head}Content-Type: {request.headers['content-type']}\r\n\r\n".encode())
        slow.sendall(body[:1000])
        eventually(lambda: "requests_in_progress 2.0" in client.get("/metrics").text, "the request")
        process.send_signal(signal.SIGTERM)
        eventually(lambda: refuses(port), "the end of the listener")
        slow.sendall(body[1000:])
        answer = b"".join(iter(lambda: slow.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200"), answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["frames"][0]["detections"]
    # uvicorn ends itself by the signal once it has shut down.
    assert process.wait(allowed(2 * DEADLINE)) in (0, -signal.SIGTERM)


def refuses(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_the_dockerfile_names_files_that_are_there() -> None:
    """No image is built here. The files that it copies exist, and it copies what the application imports."""
    text = (SERVICE / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for name in line.split()]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    imported = {
        name
        for path in copied
        if path.endswith(".py")
        for name in re.findall(r"^(?:import|from) (\w+)", (ROOT / path).read_text(), re.MULTILINE)
        if (SERVICE / f"{name}.py").exists()
    }
    assert {f"examples/service/{name}.py" for name in imported} <= set(copied)
    (command,) = re.findall(r"^CMD (\[.*\])$", text, re.MULTILINE)
    assert json.loads(command)[:2] == ["uvicorn", "app:app"]
