"""docs/troubleshooting.md: each public error has an entry, and each entry names an error that exists."""

from __future__ import annotations

import re
from pathlib import Path

from onnx_dl import errors

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
PUBLIC = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.OnnxDLError)
}
ENTRIES = set(re.findall(r"^\| `(\w+)`", PAGE.read_text(), re.MULTILINE))


def test_each_public_error_has_an_entry() -> None:
    assert not PUBLIC - {errors.OnnxDLError.__name__} - ENTRIES


def test_each_entry_is_an_error_that_exists() -> None:
    assert not ENTRIES - PUBLIC
