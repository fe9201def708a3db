"""Held-out frames, and how well a detector and a reader do on them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import images
import numpy as np
from frames import Frame, as_input, load_split, make_frames
from numpy.typing import NDArray

Floats = NDArray[np.float32]

HELD_OUT_FRAMES, HELD_OUT_SEED = 200, 2_000_000


class Measure(NamedTuple):
    """How well a detector does."""

    precision: float
    """Part of the detections that are digits (IoU with a digit of 0.5 or more, each digit counted once)."""
    recall: float
    """Part of the digits that are detected."""
    objects: int
    """Digits in all frames."""


def overlaps(boxes: Floats, others: Floats) -> Floats:
    """IoU of each pair: [boxes, others]."""
    corner = np.maximum(boxes[:, None, :2], others[None, :, :2])
    opposite = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.prod((opposite - corner).clip(0), axis=2)
    area, other_area = (np.prod(each[:, 2:] - each[:, :2], axis=1) for each in (boxes, others))
    return np.asarray(shared / (area[:, None] + other_area[None] - shared), np.float32)


def matched(found: Floats, scores: Floats, true: Floats, least: float = 0.5) -> int:
    """Number of digits that were found: the best detection takes its digit first."""
    pairs = overlaps(found, true)
    free = np.ones(len(true), bool)
    for row in np.argsort(-scores):
        candidates = np.where(free, pairs[row], 0) if len(true) else np.zeros(0)
        if len(candidates) and candidates.max() >= least:
            free[int(candidates.argmax())] = False
    return int((~free).sum())


def measure(session: Any, frames: Sequence[Frame]) -> Measure:
    """Precision and recall of a detector, run by any class with onnxruntime's ``run()``."""
    hits = found = objects = 0
    for start in range(0, len(frames), 20):
        part = frames[start : start + 20]
        boxes, scores, numbers = session.run(None, {"frames": as_input(part)})
        for number, frame in enumerate(part):
            mine = numbers == number
            hits += matched(boxes[mine], scores[mine], frame.boxes)
        found += len(boxes)
        objects += sum(len(frame.boxes) for frame in part)
    return Measure(hits / max(found, 1), hits / max(objects, 1), objects)


def reading_accuracy(detect: Any, read: Any, frames: Sequence[Frame]) -> float:
    """Part of the detected digits that are read correctly, cut out by the detector's own boxes."""
    right = seen = 0
    for frame in frames:
        pixels = as_input([frame])
        boxes, _, _ = detect.run(None, {"frames": pixels})
        pairs = overlaps(boxes, frame.boxes)
        hits = np.flatnonzero(pairs.max(axis=1, initial=0) >= 0.5)
        if len(hits):
            labels, _ = read.run(
                None, {"crops": np.stack([images.crop(pixels[0], boxes[row]) for row in hits])}
            )
            right += int((labels == frame.labels[pairs[hits].argmax(axis=1)]).sum())
            seen += len(hits)
    return right / max(seen, 1)


def held_out_frames(count: int = HELD_OUT_FRAMES) -> list[Frame]:
    """Frames of digits and backgrounds that the detector was not trained with."""
    return make_frames(load_split()[1], count, HELD_OUT_SEED)
