"""A service that finds and reads handwritten digits in images: FastAPI, with its models in onnx-dl.

Start it in this folder: ``uvicorn app:app``. README.md says how to try it.
"""

import asyncio
import contextlib
import math
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any

import images
import metrics
import msgspec
from detection import Deadline, Detector
from fastapi import FastAPI, File, Query, Request, Response, UploadFile
from fastapi.responses import JSONResponse
from settings import from_environment

import onnx_dl

# The host serves its metrics at a free port of this machine; /metrics adds them to ours.
os.environ.setdefault("ONNX_DL_METRICS", "127.0.0.1:0")

SETTINGS = from_environment()
# This process's own host, or, with ONNX_DL_HOST=NAME, one that several processes share.
HOST = onnx_dl.default_host()
MODELS = Detector(HOST, SETTINGS)
TURNS = asyncio.Semaphore(SETTINGS.max_active)


@contextlib.asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Load the models before the first request; end all our processes after the last one."""
    await asyncio.to_thread(MODELS.preload)
    try:
        yield
    finally:
        await asyncio.to_thread(HOST.close)


app = FastAPI(title="Digits in frames", lifespan=lifespan)

Scope = dict[str, Any]
Channel = Callable[..., Awaitable[Any]]


class Gate:
    """ASGI middleware: refuse bodies that are too large before they are read, and count requests."""

    def __init__(self, app: Callable[[Scope, Channel, Channel], Awaitable[None]], limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Channel, send: Channel) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status = 500

        async def counted(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with metrics.ACTIVE.track_inprogress():
            try:
                await (self._refusal(scope) or self._app)(scope, receive, counted)
            finally:
                # The path of a known route only: anybody can ask for any path.
                route = getattr(scope.get("route"), "path", "other")
                metrics.REQUESTS.labels(route, str(status)).inc()

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = dict(scope["headers"])
        if b"transfer-encoding" in headers:
            return error(411, "Send the request with Content-Length, not in chunks.")
        if int(headers.get(b"content-length", b"0")) > self._limit:
            return error(413, f"The request is too large: {self._limit} bytes are allowed.")
        return None


def error(status: int, message: str, retry_after: float | None = None) -> JSONResponse:
    """An answer that says what went wrong; ``retry_after``: seconds."""
    headers = {} if retry_after is None else {"Retry-After": str(math.ceil(max(retry_after, 1)))}
    return JSONResponse({"error": message}, status, headers)


app.add_middleware(Gate, limit=SETTINGS.max_request_bytes)


@app.exception_handler(images.BadImage)
async def bad_image(_: Request, failure: images.BadImage) -> JSONResponse:
    return error(422, str(failure))


@app.exception_handler(onnx_dl.RunTimeout)
@app.exception_handler(onnx_dl.LoadTimeout)
async def too_slow(_: Request, failure: onnx_dl.OnnxDLError) -> JSONResponse:
    """The run was cancelled; a load goes on, so that a later request finds the model loaded."""
    return error(504, f"{type(failure).__name__}: {failure}")


@app.exception_handler(onnx_dl.OnnxDLError)
async def unavailable(_: Request, failure: onnx_dl.OnnxDLError) -> JSONResponse:
    """WorkerDied, CapacityError and others: this request failed, the service goes on."""
    return error(503, f"{type(failure).__name__}: {failure}", getattr(failure, "retry_after", 1.0))


class Busy(Exception):
    """All turns are taken, and none became free in time."""


@app.exception_handler(Busy)
async def busy(_: Request, __: Busy) -> JSONResponse:
    return error(503, "The service is busy. Try again later.", 1.0)


@contextlib.asynccontextmanager
async def turn(deadline: Deadline) -> AsyncIterator[float]:
    """Wait until fewer than ``max_active`` requests are under way; gives the seconds that it took."""
    began = time.perf_counter()
    try:
        async with asyncio.timeout(deadline.left()):
            await TURNS.acquire()
    except TimeoutError:
        raise Busy from None
    try:
        yield time.perf_counter() - began
    finally:
        TURNS.release()


Images = Annotated[list[UploadFile], File(description="JPEG, PNG, WebP or BMP files")]
Seconds = Annotated[
    float, Query(gt=0, le=SETTINGS.timeout, description="seconds that the client is willing to wait")
]


async def contents(uploads: list[UploadFile]) -> list[bytes]:
    if len(uploads) > SETTINGS.max_images:
        raise images.BadImage(f"{len(uploads)} images; {SETTINGS.max_images} are allowed in one request.")
    return [await upload.read() for upload in uploads]


@app.post("/detect")
async def detect(files: Images, timeout: Seconds = SETTINGS.timeout) -> dict[str, Any]:
    """Digits in each image, with the time that each step took."""
    began = time.perf_counter()
    deadline = Deadline(timeout)
    async with turn(deadline) as waited:
        frames = await MODELS.decode(await contents(files))
        found = await MODELS.detect(frames, deadline)
    answers = []
    for upload, frame in zip(files, found, strict=True):
        times = {"wait": round(waited * 1000, 2), **frame.times._asdict()}
        for stage, spent in times.items():
            metrics.STAGES.labels(stage).observe(spent / 1000)
        metrics.FRAMES.inc()
        metrics.DETECTIONS.inc(len(frame.detections))
        detections = [detection._asdict() for detection in frame.detections]
        answers.append(
            {"name": upload.filename, "detections": detections, "batch": frame.batch, "milliseconds": times}
        )
    return {"frames": answers, "milliseconds": round((time.perf_counter() - began) * 1000, 2)}


@app.post("/quality")
async def quality(files: Images, timeout: Seconds = SETTINGS.timeout) -> dict[str, Any]:
    """Brightness, contrast and sharpness of each image."""
    deadline = Deadline(timeout)
    async with turn(deadline):
        frames = await MODELS.decode(await contents(files))
        measured = await MODELS.quality(frames, deadline)
    return {"frames": [figures._asdict() for figures in measured]}


@app.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process is alive. This does not need a model."""
    return {"status": "ok"}


@app.get("/readyz")
async def readyz() -> dict[str, str]:
    """The detector can answer. If its worker has died, this loads it again."""
    await MODELS.detector.aload(timeout=2.0)
    return {"status": "ready"}


@app.get("/models")
def models() -> Response:
    """The host's snapshot: models, states, memory."""
    # Not `async def`: it waits for the host's answer, so FastAPI has to call it in a thread.
    return Response(msgspec.json.encode(HOST.snapshot()), media_type="application/json")


@app.get("/metrics")
def prometheus() -> Response:
    return Response(metrics.page(HOST), media_type="text/plain; version=0.0.4; charset=utf-8")
