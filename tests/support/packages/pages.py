"""A page with lines of text."""

from __future__ import annotations

import cv2
import numpy as np


def page(*lines: str) -> np.ndarray:
    image = np.full((60 * len(lines) + 40, 640, 3), 255, np.uint8)
    for number, line in enumerate(lines):
        cv2.putText(image, line, (20, 60 * (number + 1)), cv2.FONT_HERSHEY_SIMPLEX, 1.2, (0, 0, 0), 2)
    return image
