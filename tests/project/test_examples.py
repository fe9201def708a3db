"""The examples and the demo, as a newcomer runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
EXPECTED = {
    "01_basic_usage.py": ["after the first use, loaded: True", "unloaded: True - loaded: False"],
    "02_context_manager.py": ["in the block, loaded: True", "closed"],
    "03_drop_in_replacement.py": ["equal: True", "isinstance: True", "INVALID_ARGUMENT"],
    "04_shared_proxy.py": ["4 proxies", "loaded 1 time(s)"],
    "05_zero_copy.py": ["equal: True"],
    "06_patch.py": ["equal results: True", "wine.onnx is ready in process"],
    "07_memory_limit.py": ["every call was answered", "evictions, the first of"],
    "08_group.py": ["group:demo: 3 models", "loaded 1 time(s)", "[False, False, False]"],
    "09_asyncio.py": ["39 of 40 right", "no time left: RunTimeout"],
    "10_shared_host.py": ["2 programs, loaded 1 time(s)"],
}


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=110,
        cwd=cwd,
        # Shared hosts of a test are the test's own.
        env=os.environ | {"PYTHONWARNINGS": "error", "ONNX_DL_RUNTIME_DIR": str(cwd)},
        check=False,
    )


def test_every_example_is_tested() -> None:
    assert sorted(EXPECTED) == sorted(path.name for path in EXAMPLES.glob("[0-9]*.py"))


def test_the_page_lists_every_example() -> None:
    page = (EXAMPLES / "README.md").read_text()
    names = [path.name for path in EXAMPLES.iterdir() if path.name not in ("README.md", "__pycache__")]
    assert [name for name in names if f"]({name})" not in page and f"]({name}/" not in page] == []
    assert "pip install onnxruntime" not in page


@pytest.mark.parametrize("name", EXPECTED)
def test_an_example(name: str, tmp_path: Path) -> None:
    done = run(str(EXAMPLES / name), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [words for words in EXPECTED[name] if words not in done.stdout] == []
    if name == "04_shared_proxy.py":  # it shows the log there
        assert done.stderr.count("gave back") == 1
    else:
        assert done.stderr == ""


def test_the_demo(tmp_path: Path) -> None:
    done = run("-m", "onnx_dl.cli", "demo", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "4 of 4 models" in done.stdout
    assert done.stdout.count("gave back") == 4
    for reason in ("reason ttl", "reason request"):
        assert reason in done.stdout
    assert "left over" in done.stdout and "large, batch of 16 " in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "\x1b" not in done.stdout


def test_the_version() -> None:
    done = run("-m", "onnx_dl.cli", "--version", cwd=EXAMPLES)
    assert done.stdout.startswith("onnx-dl 0.")
