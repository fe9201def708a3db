"""docs/settings.md lists every variable that the code knows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from onnx_dl.core.settings import ELSEWHERE, INTERNAL, Settings

ROOT = Path(__file__).parents[2]


def test_the_table_is_what_the_code_says() -> None:
    command = [sys.executable, str(ROOT / ".ci" / "settings_table.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_variable_in_the_code_is_known() -> None:
    known = {f"ONNX_DL_{field.upper()}" for field in Settings.__struct_fields__}
    known |= ELSEWHERE.keys() | INTERNAL.keys()
    named = {
        name
        for path in (ROOT / "src").rglob("*.py")
        for name in re.findall(r"ONNX_DL_[A-Z_]*[A-Z]", path.read_text())
    }
    assert named >= {"ONNX_DL_RUNTIME_DIR", "ONNX_DL_RUN"}
    assert named - known == set()
