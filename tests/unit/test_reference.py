"""The API reference has every public name."""

from __future__ import annotations

import re
from pathlib import Path

import onnx_dl

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
DIRECTIVE = r"^\.\. (?:auto(?:class|function|exception):: onnx_dl\.|py:class:: )(\w+)(?:\(\))?$"


def test_every_public_name_is_in_the_reference_once() -> None:
    pages = "\n".join(path.read_text() for path in REFERENCE.glob("*.md"))
    assert sorted(re.findall(DIRECTIVE, pages, re.MULTILINE)) == sorted(onnx_dl.__all__)


def test_every_error_is_public() -> None:
    errors = [cls.__name__ for cls in onnx_dl.errors.BY_CODE.values()]
    assert set(errors) <= set(onnx_dl.__all__)
