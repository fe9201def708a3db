"""Other versions of onnx-dl: copies of the package with another protocol version, and programs of them."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import onnx_dl
from onnx_dl.protocol.codec import PROTOCOL_VERSION

_MESSAGES = "protocol/codec.py"
_BEFORE_5 = [
    ("transport/rendezvous.py", 'stem = name if protocol is None else f"{name}@{protocol}"', "stem = name"),
    ("transport/rendezvous.py", "and record.protocol == self.protocol", ""),
    ("transport/rendezvous.py", "protocol=self.protocol,\n            package=__version__,", ""),
    ("transport/rendezvous.py", "            started=uptime(),\n", ""),
    ("supervisor/lifetime.py", "running_hosts.reason_to_leave(self._place)", "None"),
]
"""What versions before 5 lack, as (file, text, text in its place): a version in names and records, and a host
that looks for its follower."""

_PROGRAM = """
import json, sys
import numpy as np
import onnx_dl
onnx_dl.InferenceSessionProxy  # imports all that a client needs
CPU = ["CPUExecutionProvider"]

def use(path):
    proxy = onnx_dl.InferenceSessionProxy(path, providers=CPU, host=onnx_dl.connect("mine"))
    kept.append(proxy)
    return float(proxy.run(["twice"], {"x": np.full((1, 1), 21, np.float32)})[0][0, 0])

def use_own(path):
    return onnx_dl.ModelHost().open(path, providers=CPU).run(None, {})

def host():
    return onnx_dl.connect("mine").snapshot().supervisor_pid

def adopt(path):
    onnx_dl.connect("mine").adopt(path)

kept = []
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    name, *arguments = json.loads(line)
    try:
        answer = globals()[name](*arguments)
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    print(json.dumps(answer), flush=True)
"""


class Version:
    """A copy of the package."""

    def __init__(self, folder: Path, protocol: int, package: str, *, before_5: bool = False) -> None:
        self.protocol = protocol
        self.package = package
        self.folder = folder
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(onnx_dl.__file__).parent, folder / "onnx_dl", ignore=skipped)
        self.speak(protocol)
        for name, text, other in _BEFORE_5 if before_5 else ():
            self._change(name, text, other)
        self._change(
            "core/version.py", f'__version__ = "{onnx_dl.__version__}"', f'__version__ = "{package}"'
        )
        # From now on a program of this copy finds its modules compiled, as after an installation.
        subprocess.run([sys.executable, "-m", "compileall", "-q", str(folder)], check=True, timeout=60)

    def speak(self, protocol: int) -> None:
        """Replaces the package on disk by that of another protocol version."""
        before = "PROTOCOL_VERSION = "
        text = (self.folder / "onnx_dl" / _MESSAGES).read_text()
        (line,) = [line for line in text.splitlines() if line.startswith(before)]
        self._change(_MESSAGES, line, f"{before}{protocol}")

    def _change(self, name: str, text: str, other: str) -> None:
        path = self.folder / "onnx_dl" / name
        assert path.read_text().count(text) == 1, f"{name} has changed: {text!r}"
        new = path.with_suffix(".new")
        new.write_text(path.read_text().replace(text, other))
        new.replace(path)  # a process that starts at this moment sees one or the other
        # What is compiled is known by the text's length and the second of its time, which may be the same.
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)

    @property
    def environment(self) -> dict[str, str]:
        before = filter(None, [str(self.folder), os.environ.get("PYTHONPATH")])
        return os.environ | {"PYTHONPATH": os.pathsep.join(before)}

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs the command ``onnx-dl`` of this version."""
        return subprocess.run(
            [sys.executable, "-m", "onnx_dl.cli", *arguments],
            env=self.environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip


class Program:
    """A program that uses a version, and does what it is told."""

    def __init__(self, version: Version) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            env=version.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._answer() == "ready"

    def ask(self, name: str, *arguments: Any) -> Any:
        """What a function of the program returned; an exception as text."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        """As by its own will."""
        self._process.communicate(timeout=60)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()


def made(folder: Path, names: Sequence[str] = ("this", "next", "before 5")) -> dict[str, Version]:
    """One that speaks as this one does, one that comes after it, one that does not tell its version."""
    ways: dict[str, Any] = {
        "this": (PROTOCOL_VERSION, "7.7.0"),
        "next": (PROTOCOL_VERSION + 1, "8.8.0"),
        "before 5": (4, "0.2.0"),
    }
    return {
        name: Version(folder / name.replace(" ", ""), *ways[name], before_5=name == "before 5")
        for name in names
    }
