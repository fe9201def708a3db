"""Synthetic frames: handwritten digits on noisy, coloured backgrounds, with other shapes between them.

The digits come with scikit-learn (``load_digits``), so nothing is downloaded. The same seed makes the same
frames. The training script, the load test and the tests use this module. The service itself does not.
"""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

WIDTH, HEIGHT = 320, 240
"""Size of a frame in pixels."""
SMALLEST, LARGEST = 18, 34
"""Side of a digit in pixels."""
DIGITS_SEED = 7
"""Seed of the split into digits to train with and digits to measure with."""


class Digits(NamedTuple):
    """Pictures of digits with their labels."""

    pictures: NDArray[np.float32]
    """[digits, 8, 8], from 0 to 1."""
    labels: NDArray[np.int64]
    """[digits], from 0 to 9."""


class Frame(NamedTuple):
    """One frame, and what is in it."""

    pixels: NDArray[np.uint8]
    """[HEIGHT, WIDTH, 3], RGB."""
    boxes: NDArray[np.float32]
    """[objects, 4]: left, top, right, bottom in pixels."""
    labels: NDArray[np.int64]
    """[objects], from 0 to 9."""


def load_split() -> tuple[Digits, Digits]:
    """Return the digits to train with, and those to measure with."""
    data = load_digits()
    train, test, train_labels, test_labels = train_test_split(
        data.images, data.target, test_size=0.25, random_state=DIGITS_SEED, stratify=data.target
    )

    def digits(images: NDArray[np.float64], labels: NDArray[np.int64]) -> Digits:
        return Digits((images / 16).astype(np.float32), labels.astype(np.int64))

    return digits(train, train_labels), digits(test, test_labels)


def make_frame(digits: Digits, generator: np.random.Generator) -> Frame:
    """Draw one frame with two to eight digits that do not overlap."""
    canvas = _background(generator)
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    wanted = int(generator.integers(2, 9))
    for _ in range(20 * wanted):
        if len(boxes) == wanted:
            break
        side = int(generator.integers(SMALLEST, LARGEST + 1))
        left, top = int(generator.integers(0, WIDTH - side)), int(generator.integers(0, HEIGHT - side))
        box = (left, top, left + side, top + side)
        if any(_overlap(box, other) for other in boxes):
            continue
        chosen = int(generator.integers(len(digits.labels)))
        _draw(canvas, digits.pictures[chosen], box, generator)
        boxes.append(box)
        labels.append(int(digits.labels[chosen]))
    canvas += generator.normal(0, generator.uniform(2, 12), canvas.shape)
    pixels = canvas.clip(0, 255).astype(np.uint8)
    return Frame(pixels, np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64))


def make_frames(digits: Digits, count: int, seed: int) -> list[Frame]:
    """Draw ``count`` frames."""
    generator = np.random.default_rng(seed)
    return [make_frame(digits, generator) for _ in range(count)]


def as_input(frames: Sequence[Frame]) -> NDArray[np.float32]:
    """Frames as the model takes them: [frames, 3, height, width], from 0 to 1."""
    pixels = np.stack([frame.pixels for frame in frames]).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(pixels, np.float32) / np.float32(255)


def encode(frame: Frame, form: str = "JPEG") -> bytes:
    """Return the frame as a file: ``JPEG`` or ``PNG``."""
    file = io.BytesIO()
    Image.fromarray(frame.pixels).save(file, form, quality=92)
    return file.getvalue()


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    margin = 2
    return a[0] < b[2] + margin and b[0] < a[2] + margin and a[1] < b[3] + margin and b[1] < a[3] + margin


def _background(generator: np.random.Generator) -> NDArray[np.float64]:
    """Coarse colour patches, and lines, ellipses and rectangles that are not digits."""
    coarse = generator.integers(10, 110, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(int(generator.integers(3, 9))):
        x, y = int(generator.integers(WIDTH)), int(generator.integers(HEIGHT))
        width, height = (int(size) for size in generator.integers(10, 70, 2))
        colour = tuple(int(part) for part in generator.integers(90, 230, 3))
        line = int(generator.integers(1, 5))
        match int(generator.integers(4)):
            case 0:
                draw.line((x, y, x + width, y + height), colour, line)
            case 1:
                draw.ellipse((x, y, x + width, y + height), outline=colour, width=line)
            case 2:
                draw.rectangle((x, y, x + width, y + height), outline=colour, width=line)
            case _:
                draw.rectangle((x, y, x + width, y + height), colour)
    return np.asarray(image, np.float64).copy()


def _draw(
    canvas: NDArray[np.float64],
    picture: NDArray[np.float32],
    box: tuple[int, int, int, int],
    generator: np.random.Generator,
) -> None:
    """Put a light digit on the canvas, and a dark plate behind half of them."""
    left, top, right, bottom = box
    side = right - left
    scaled = Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)
    strength = np.asarray(scaled, np.float64).clip(0, 1)[..., None]
    place = canvas[top:bottom, left:right]
    if generator.random() < 0.5:
        place *= 0.4
    place[:] = place * (1 - strength) + generator.integers(185, 256, 3) * strength
