"""Images of any size to frames as the detector takes them, and boxes back to the image's pixels."""

import io
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

WIDTH, HEIGHT = 320, 240
"""Size of a frame. All images are brought to this size, so that they fit into one batch."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


class BadImage(ValueError):
    """The file is not an image that the service accepts."""


class Fit(NamedTuple):
    """Where the image lies in its frame."""

    scale: float
    """Pixels of the frame per pixel of the image."""
    left: int
    top: int
    width: int
    height: int
    """Size of the image, in its own pixels."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image in its frame."""
        return max(1, round(self.width * self.scale)), max(1, round(self.height * self.scale))

    def to_image(self, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Boxes [boxes, 4] in pixels of the frame to pixels of the image."""
        moved = boxes - np.array([self.left, self.top] * 2, np.float32)
        return np.clip(moved / self.scale, 0, [self.width, self.height] * 2).astype(np.float32)


def decode(data: bytes, max_pixels: int, into: NDArray[np.float32]) -> Fit:
    """Decode, resize and normalize one image.

    Args:
        data: the file, in one of :data:`FORMATS`.
        max_pixels: larger images are refused, before they are decoded.
        into: [3, HEIGHT, WIDTH], receives the frame, RGB from 0 to 1. The image keeps its aspect ratio; the
            rest of the frame is 0.

    Raises:
        BadImage: it is no image, it is damaged, or it is too large.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise BadImage(
                    f"The image has {image.width} x {image.height} pixels; {max_pixels} are allowed."
                )
            fit = _fit(image.width, image.height)
            image.draft("RGB", (WIDTH, HEIGHT))  # JPEG: a large image is decoded at a smaller size
            pixels = np.asarray(image.convert("RGB").resize(fit.size, Image.Resampling.BILINEAR))
    except UnidentifiedImageError:
        raise BadImage(f"This is not an image in one of the formats {', '.join(FORMATS)}.") from None
    except BadImage:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImage(f"The image is damaged: {error}") from None
    into[:] = 0
    place = into[:, fit.top : fit.top + pixels.shape[0], fit.left : fit.left + pixels.shape[1]]
    np.multiply(pixels.transpose(2, 0, 1), np.float32(1 / 255), out=place)
    return fit


def _fit(width: int, height: int) -> Fit:
    """The largest place in the middle of a frame."""
    scale = min(WIDTH / width, HEIGHT / height)
    fit = Fit(scale, 0, 0, width, height)
    left, top = (WIDTH - fit.size[0]) // 2, (HEIGHT - fit.size[1]) // 2
    return fit._replace(left=left, top=top)


def crop(frame: NDArray[np.float32], box: NDArray[np.float32], side: int = 16) -> NDArray[np.float32]:
    """Cut a digit out of a frame, as the reader takes it.

    Args:
        frame: [3, HEIGHT, WIDTH], from 0 to 1.
        box: left, top, right, bottom in pixels of the frame.

    Returns:
        [side * side] grey values from 0 (background) to 1 (stroke).
    """
    left, top = (int(max(0, value)) for value in np.round(box[:2]))
    right, bottom = (int(value) for value in np.round(box[2:]))
    part = frame[:, top : max(bottom, top + 1), left : max(right, left + 1)]
    if part.size == 0:
        return np.zeros(side * side, np.float32)
    grey = np.tensordot(np.array([0.299, 0.587, 0.114], np.float32), part, axes=1)
    small = Image.fromarray(grey).resize((side, side), Image.Resampling.BILINEAR)
    values = np.asarray(small, np.float32)
    darkest, lightest = np.percentile(values, 20), values.max()
    return ((values - darkest) / max(float(lightest - darkest), 1e-3)).clip(0, 1).ravel()
