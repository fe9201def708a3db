"""The page for users of 0.1.0: its programs run, and what they could import is named."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from onnx_dl.demo.assets import model_path

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "moving-from-0.1.0.md"


def test_its_programs_run(tmp_path: Path) -> None:
    shutil.copy(model_path("digits"), tmp_path / "model.onnx")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 2
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(blocks)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
