"""Every promise on the page names a test that exists."""

from __future__ import annotations

import re
from pathlib import Path

from tests.session.test_compatibility import functions_of

PAGE = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
NAMED = re.findall(r"`((?:\w+/)*\w+\.py)::(\w+)`", PAGE)


def test_every_promise_names_a_test() -> None:
    promised = PAGE.partition("## Promises")[2].partition("\n## ")[0]
    rows = [line for line in promised.splitlines() if line.startswith("| ") and "---" not in line]
    promises = [row for row in rows if row != "| promise | test |"]
    assert len(promises) > 20
    assert [row for row in promises if "::" not in row] == []


def test_every_test_on_the_page_exists() -> None:
    assert len(NAMED) == PAGE.count("::")
    assert [f"{file}::{name}" for file, name in NAMED if name not in functions_of(file)] == []
