"""The code on the pages runs, each page in a process and a folder of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from onnx_dl.transport import running_hosts
from tests.support import page_models
from tests.support.pages import MISSING, SKIP, is_run

ROOT = Path(__file__).parents[2]
TEXTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if "_build" not in path.parts
}


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if is_run(text)])
def test_the_code_of_a_page_runs(page: str, tmp_path: Path) -> None:
    page_models.write(tmp_path)
    private = {"ONNX_DL_RUNTIME_DIR": str(tmp_path / "run"), "ONNX_DL_CACHE_DIR": str(tmp_path / "cache")}
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.support.pages", str(ROOT / page)],
        cwd=tmp_path,
        env=os.environ | private | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode == MISSING:
        pytest.skip(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert running_hosts.running(environ=os.environ | private) == []


def test_few_blocks_are_skipped_and_each_says_why() -> None:
    marks = [mark for text in TEXTS.values() for mark in re.findall(r"<!-- skip:.*", text)]
    assert [mark for mark in marks if not SKIP.match(mark)] == []
    assert len(marks) <= 6
