"""What runs the tests' programs: it tells of one that hangs, and of processes that one has left."""

from __future__ import annotations

import sys

import pytest

from tests.support.programs import Hung, ended

pytestmark = pytest.mark.slow

PATIENCE = 2.0
"""Seconds; enough for an interpreter that imports nothing."""


def test_what_a_program_writes_and_how_it_ends() -> None:
    done = ended([sys.executable, "-c", "import sys; print('out'); sys.exit('err')"])
    assert (done.returncode, done.stdout, done.stderr) == (1, "out\n", "err\n")


def test_a_program_that_hangs_is_ended_with_its_stacks() -> None:
    code = "import threading\ndef hangs():\n threading.Event().wait()\nprint('begun', flush=True)\nhangs()"
    with pytest.raises(Hung, match=r"(?s)did not end.*in hangs.*begun"):
        ended([sys.executable, "-c", code], patience=PATIENCE)


def test_a_program_that_hangs_is_ended_also_if_a_child_has_its_output() -> None:
    code = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    with pytest.raises(Hung, match=r"did not end(?s:.)*time\.sleep(?s:.)*in wait"):
        ended([sys.executable, "-c", code], patience=PATIENCE)


def test_a_process_that_a_program_leaves_is_named() -> None:
    code = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    with pytest.raises(Hung, match=r"has left processes(?s:.)*time\.sleep"):
        ended([sys.executable, "-c", code], patience=PATIENCE)
