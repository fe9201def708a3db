"""``onnx-dl run`` is Python in all but the sessions: programs in both, compared to the last letter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import onnx_dl
from tests.support import launched
from tests.support.slow import identity_model
from tests.support.waiting import DEADLINE, allowed

pytestmark = pytest.mark.slow

PYTHON = [sys.executable]
RUN = [sys.executable, "-m", "onnx_dl", "run"]

PROGRAMS = {
    "a file": '"$@" state.py a b',
    "in a folder": '"$@" folder/state.py',
    "by its whole path": '"$@" "$PWD/folder/../state.py"',
    "without a suffix": '"$@" state',
    "arguments that are options of ours": '"$@" state.py --ttl 5 --lazy -m -c -- --set x',
    "after --": '"$@" -- state.py --',
    "a module": '"$@" -m state a',
    "a module, in one word": '"$@" -mstate --ttl 5',
    "a package": '"$@" -m package a',
    "a part of a package": '"$@" -m package.part',
    "a package without a main": '"$@" -m bare',
    "a module that is not there": '"$@" -m nothere',
    "code": '"$@" -c "$(cat state.py)" a -c b',
    "code that raises": '"$@" -c "def f(): 1/0\nf()"',
    "code that begins as an option": '"$@" -c "-print(1)"',
    "standard input": '"$@" - a b <raises.py',
    "a pipe": 'cat state.py | "$@" /dev/stdin a',
    "process substitution": '"$@" <(cat raises.py) a',
    "a FIFO": 'rm -f fifo; mkfifo fifo; cat state.py >fifo & "$@" fifo; code=$?; wait; exit $code',
    "a folder": '"$@" whole a',
    "a folder without a main": '"$@" folder',
    "a zip file": '"$@" app.pyz a',
    "a zip file that raises": '"$@" bad.pyz',
    "compiled": '"$@" state.pyc a',
    "compiled, and raises": '"$@" raises.pyc',
    "no file": '"$@" nope.py',
    "no Python": '"$@" binary',
    "errors with a cause": '"$@" raises.py',
    "an error in a module": '"$@" -m raises',
    "errors in groups": '"$@" group.py',
    "no syntax": '"$@" syntax.py',
    "no syntax in a module": '"$@" -m syntax',
    "an exit": '"$@" exits.py none && "$@" exits.py text; "$@" exits.py seven',
    "Ctrl-C": 'exec "$@" interrupted.py',
    "an excepthook": '"$@" excepthook.py',
    "frames": '"$@" frames.py; "$@" -m frames; "$@" -c "import frames"',
    "a thread that outlives a module": '"$@" -m outlives; "$@" outlives.py',
    "threads that fail": '"$@" threads.py',
    "spawned": '"$@" spawns.py spawn',
    "spawned from a module": '"$@" -m spawns spawn',
    "from a fork server": '"$@" spawns.py forkserver',
    "forked": '"$@" spawns.py fork',
    "the order of the end": '"$@" atexit_order.py',
    "warnings": '"$@" warns.py; "$@" -W error::DeprecationWarning warns.py',
    "a restart": '"$@" restarts.py',
    "runpy in it": '"$@" runs_another.py',
    "a process that it starts": '"$@" starts.py',
    "questions, and the debugger": '''printf 'me\nwhere\nc\n' | "$@" asks.py''',
    "under the debugger": '''printf 'n\nwhere\nc\nq\n' | "$@" -m pdb exits.py seven''',
    "asyncio": '"$@" runs_async.py',
    "unittest": '"$@" -m unittest test_it',
    "pytest": '"$@" -m pytest -q -p no:cacheprovider -p no:xdist test_it.py',
    "doctest": '"$@" -m doctest documented.py',
    "options": '"$@" -u -X dev -Wdefault -O -B -s -b state.py',
    "options in one word": '"$@" -uBc "$(cat state.py)"',
    "an option that does not exist": '"$@" -Z state.py',
    "the version": '"$@" -V',
    "a safe path": '"$@" -P state.py; PYTHONSAFEPATH=1 "$@" -m package',
    "environment": 'PYTHONDEVMODE=1 PYTHONHASHSEED=1 "$@" state.py',
    "no search path": 'PYTHONPATH= "$@" state.py; unset PYTHONPATH; "$@" -m state',
    "a sitecustomize": 'PYTHONPATH=own:$PYTHONPATH "$@" state.py',
    # The command is a Python of its own, which has failed before.
    "a sitecustomize that fails": 'PYTHONPATH=broken:$PYTHONPATH "$@" raises.py 2>&1 | sort -u',
    "the C locale": 'unset LC_ALL LC_CTYPE; LANG=C "$@" state.py; LC_CTYPE=C LANG=en_GB.UTF-8 "$@" state.py',
    "another locale": 'LC_ALL=C "$@" state.py; PYTHONUTF8=0 LC_ALL=C "$@" state.py',
    "closed streams": '"$@" state.py <&-; "$@" frames.py >&-; "$@" raises.py 2>&-;'
    '"$@" exits.py seven <&- >&- 2>&-',
    "nobody who reads": '"$@" state.py | true; echo ${PIPESTATUS[0]}; "$@" -c "print(1)" >/dev/full; echo $?',
    "signals that are ignored": """trap '' INT HUP; "$@" -c 'import signal
for s in sorted(signal.valid_signals()): print(s, signal.getsignal(s))'; "$@" interrupted.py""",
    "a descriptor": '"$@" state.py 7<state.py',
    "a model": '"$@" model.py model.onnx',
    "a model in a module": '"$@" -m model model.onnx',
    "a model in a zip file": '"$@" -O -W error model.pyz model.onnx',
}  # fmt: skip
"""Each a line for bash; ``"$@"`` stands for Python."""


class Outcome(NamedTuple):
    status: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("programs")
    launched.write(found)
    (found / "model.onnx").write_bytes(identity_model())
    return found


def ran(python: list[str], line: str, folder: Path) -> Outcome:
    done = subprocess.run(
        ["bash", "-c", line, "bash", *python],
        cwd=folder, env=environ(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=allowed(4 * DEADLINE),
    )  # fmt: skip
    return Outcome(done.returncode, told(done.stdout), told(done.stderr))


def environ() -> dict[str, str]:
    """Without what the tests were started with; ``onnx_dl`` is found all the same."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    return {**kept, "PYTHONPATH": str(Path(onnx_dl.__file__).parent.parent), "PYTHONDONTWRITEBYTECODE": "1"}


def told(text: str) -> str:
    """Without what differs from run to run: addresses, ids and times."""
    text = re.sub(r"0x[0-9a-f]{6,}", "0x…", text)
    text = re.sub(r"\bpid=\d+|(?<=line )\d+ in _find_and_load\b", "", text)
    return re.sub(r"\b\d+\.\d+ ?s\b", "… s", text)


def is_installed() -> bool:
    """Whether Python finds this tree without being told where it is."""
    code = "import onnx_dl; print(onnx_dl.__file__)"
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*PYTHON, "-c", code], cwd="/", env=bare, capture_output=True, text=True)
    return done.stdout.strip() == onnx_dl.__file__


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_is_python(name: str, folder: Path) -> None:
    if "unset PYTHONPATH" in PROGRAMS[name] and not is_installed():
        pytest.skip("another tree than this one is installed")
    plain, ours = (ran(python, PROGRAMS[name], folder) for python in (PYTHON, RUN))
    assert ours == plain, PROGRAMS[name]
    assert plain.stdout or plain.stderr
