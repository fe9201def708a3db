"""Find digits in frames, read them, and measure frames: three models, each with a TTL of its own."""

import asyncio
import time
from collections.abc import Sequence
from typing import NamedTuple

import images
import numpy as np
from numpy.typing import NDArray
from settings import Settings

import onnx_dl

Floats = NDArray[np.float32]


class Detection(NamedTuple):
    """One digit in one frame."""

    box: list[float]
    """Left, top, right, bottom in pixels of the image."""
    score: float
    label: str
    label_score: float


class Times(NamedTuple):
    """How long the steps of one frame took, in milliseconds; steps on a batch count for each frame of it."""

    decode: float
    detect: float
    read: float


class Found(NamedTuple):
    """The answer for one frame."""

    detections: list[Detection]
    times: Times
    batch: int
    """Frames in its batch."""


class Quality(NamedTuple):
    """Figures of one frame."""

    brightness: float
    contrast: float
    sharpness: float


class Deadline:
    """The time of one request, which all its calls share."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return max(0.0, self._end - time.monotonic())


class Frames(NamedTuple):
    """Decoded images of one request."""

    pixels: Floats
    """[frames, 3, HEIGHT, WIDTH]"""
    fits: list[images.Fit]
    decode: list[float]
    """Milliseconds of each."""


class Detector:
    """The models of the service. Nothing is loaded until :meth:`preload` or the first use."""

    def __init__(self, host: onnx_dl.ModelHost, settings: Settings) -> None:
        self._settings = settings
        self._host = host
        self.detector = host.open(settings.detector_model, ttl=settings.detector_ttl, priority=1)
        self.reader = host.open(settings.reader_model, ttl=settings.reader_ttl)
        self.quality_model = host.open(settings.quality_model, ttl=settings.quality_ttl)

    def preload(self, timeout: float = 60.0) -> None:
        """Load what nearly every request needs; raises if a model does not load."""
        self._host.preload([self.detector, self.reader], timeout=timeout)

    async def decode(self, files: Sequence[bytes]) -> Frames:
        """Decode images in threads, straight into memory that the workers see; raises BadImage."""
        pixels = self._host.empty((len(files), 3, images.HEIGHT, images.WIDTH))

        def one(data: bytes, into: Floats) -> tuple[images.Fit, float]:
            began = time.perf_counter()
            fit = images.decode(data, self._settings.max_pixels, into)
            return fit, _milliseconds(began)

        work = [asyncio.to_thread(one, data, into) for data, into in zip(files, pixels, strict=True)]
        done = await asyncio.gather(*work)
        return Frames(pixels, [fit for fit, _ in done], [spent for _, spent in done])

    async def detect(self, frames: Frames, deadline: Deadline) -> list[Found]:
        """Find and read the digits of all frames, in batches of ``batch_size``."""
        found: list[Found] = []
        for part in self._batches(frames):
            batch = Frames(frames.pixels[part], frames.fits[part], frames.decode[part])
            found += await self._detect_batch(batch, deadline)
        return found

    def _batches(self, frames: Frames) -> list[slice]:
        """Parts of ``batch_size`` frames: they bound the memory that one run needs."""
        size = self._settings.batch_size
        return [slice(start, start + size) for start in range(0, len(frames.pixels), size)]

    async def _detect_batch(self, frames: Frames, deadline: Deadline) -> list[Found]:
        began = time.perf_counter()
        boxes, scores, numbers = await self.detector.arun(
            None, {"frames": frames.pixels}, timeout=deadline.left()
        )
        detect = _milliseconds(began)
        began = time.perf_counter()
        labels, label_scores = await self._read(frames.pixels, boxes, numbers, deadline)
        read = _milliseconds(began)
        answers: list[Found] = []
        for number, (fit, decode) in enumerate(zip(frames.fits, frames.decode, strict=True)):
            rows = np.flatnonzero(numbers == number)
            corners = fit.to_image(boxes[rows])
            detections = [
                Detection(
                    [round(float(value), 1) for value in box],
                    round(float(scores[row]), 4),
                    str(labels[row]),
                    round(float(label_scores[row]), 4),
                )
                for row, box in zip(rows, corners, strict=True)
            ]
            answers.append(Found(detections, Times(decode, detect, read), len(frames.pixels)))
        return answers

    async def _read(
        self, pixels: Floats, boxes: Floats, numbers: NDArray[np.int64], deadline: Deadline
    ) -> tuple[NDArray[np.int64], Floats]:
        """Label of each box, and the reader's probability of it."""
        if not len(boxes):
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        crops = np.stack(
            [images.crop(pixels[number], box) for number, box in zip(numbers, boxes, strict=True)]
        )
        labels, probabilities = await self.reader.arun(None, {"crops": crops}, timeout=deadline.left())
        return labels, probabilities.max(axis=1)

    async def quality(self, frames: Frames, deadline: Deadline) -> list[Quality]:
        """Brightness, contrast and sharpness of each frame. With ``ttl=0`` each batch loads the model."""
        measured: list[Quality] = []
        for part in self._batches(frames):
            columns = await self.quality_model.arun(
                None, {"frames": frames.pixels[part]}, timeout=deadline.left()
            )
            rows = zip(*columns, strict=True)
            measured += [Quality(*(round(float(value), 5) for value in row)) for row in rows]
        return measured


def _milliseconds(began: float) -> float:
    return round((time.perf_counter() - began) * 1000, 2)
