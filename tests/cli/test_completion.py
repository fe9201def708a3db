"""What a shell completes after ``onnx-dl completion``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from onnx_dl.cli.main import main
from tests.support.waiting import DEADLINE, allowed

_COMPLETE = """
source "$1" || exit 3
COMP_WORDS=(${@:2})
[[ $2 == onnx-dl && $# -gt 2 ]] || exit 4
COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
function_name=$(complete -p onnx-dl | sed -E 's/.*-F ([^ ]+).*/\\1/')
$function_name onnx-dl "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script for bash."""
    path = tmp_path_factory.mktemp("completion") / "onnx-dl.bash"
    done = subprocess.run(
        [sys.executable, "-m", "onnx_dl", "completion", "bash"], capture_output=True, text=True,
        timeout=allowed(DEADLINE),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    path.write_text(done.stdout)
    return path


def completed(script: Path, folder: Path, *words: str) -> set[str]:
    done = subprocess.run(
        ["bash", "--norc", "-c", _COMPLETE, "bash", str(script), *words],
        cwd=folder, capture_output=True, text=True, timeout=allowed(DEADLINE),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return set(done.stdout.split())


def test_bash_completes_commands_options_and_files(script: Path, tmp_path: Path) -> None:
    (tmp_path / "asr.onnx").touch()
    assert completed(script, tmp_path, "onnx-dl", "un") == {"unload"}
    assert completed(script, tmp_path, "onnx-dl", "load", "--t") == {"--ttl"}
    assert completed(script, tmp_path, "onnx-dl", "load", "as") == {"asr.onnx"}
    assert completed(script, tmp_path, "onnx-dl", "run", "as") == {"asr.onnx"}
    assert completed(script, tmp_path, "onnx-dl", "supervise", "--config", "as") == {"asr.onnx"}
    assert completed(script, tmp_path, "onnx-dl", "serve", "--rep") == {"--repository"}
    assert completed(script, tmp_path, "onnx-dl", "serve", "--token-file", "as") == {"asr.onnx"}
    assert completed(script, tmp_path, "onnx-dl", "serve", "--model-control", "p") == {"poll"}
    (tmp_path / "assets").mkdir()
    assert completed(script, tmp_path, "onnx-dl", "serve", "--repository", "as") == {"assets"}


@pytest.mark.parametrize(
    ("shell", "start"), [("zsh", "#compdef onnx-dl"), ("tcsh", "# AUTOMATICALLY GENERATED")]
)
def test_other_shells(shell: str, start: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert capsys.readouterr().out.startswith(start)
