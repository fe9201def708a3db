"""rapidocr-onnxruntime: three models that find text, turn it and read it."""

from __future__ import annotations

from typing import Any

import numpy as np
import rapidocr_onnxruntime
from pages import page
from shown import show


def read() -> tuple[Any, Any]:
    reader = rapidocr_onnxruntime.RapidOCR()
    image = page("HELLO WORLD", "one two three", "Total 12345")
    # The times that it took, which it also returns, are left out.
    pages = [image, image[:, ::-1], np.rot90(image, 2).copy(), page("wide " * 6), image[:8, :8]]
    found = [reader(each)[0] for each in pages]
    return [
        found,
        reader(image, use_det=False, use_cls=True, use_rec=False)[0],
        reader(image[:90], use_det=False, use_cls=False, use_rec=True)[0],
    ], reader


if __name__ == "__main__":
    show(read)
