"""rapidocr, the successor of rapidocr-onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import rapidocr
from pages import page
from shown import show


def read() -> tuple[Any, Any]:
    reader = rapidocr.RapidOCR()
    image = page("HELLO WORLD", "one two three", "Total 12345")
    found = [reader(each) for each in (image, np.rot90(image, 2).copy(), image[:, ::-1], page("wide " * 6))]
    words = reader(image, return_word_box=True)
    known = [(one.boxes, one.txts, one.scores) for one in (*found, words)]
    return [known, words.word_results], reader


if __name__ == "__main__":
    show(read)
