"""Runs the code of one page: ``python -m tests.support.pages PAGE``, in a folder with the page's models.

All blocks of a page share one namespace, which has numpy as ``np``, ``onnx_dl`` and ``InferenceSessionProxy``
from the start.

- ``python``: is run; ``await`` at the top level runs in asyncio, or in trio if the block names it.
- ``toml``: is read as the file of a host.
- ``sh``, ``console`` or no language: each command ``onnx-dl ...`` is parsed, and run if it is in RUN.

``<!-- skip: next "REASON" -->`` before a block skips it.
"""

from __future__ import annotations

import ast
import asyncio
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final
from unittest import SkipTest

import numpy as np
from sybil import Document, Example, Region
from sybil.evaluators.python import pad
from sybil.parsers.markdown import SkipParser
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

import onnx_dl
from onnx_dl.cli import main as cli
from onnx_dl.cli.run import split
from onnx_dl.supervisor.hostfile import reader
from onnx_dl.transport import running_hosts

RUN: Final = {"load", "pin", "unload", "ps", "stop", "cache"}
"""Commands that end by themselves and soon."""
NEED_A_HOST: Final = {"unload", "ps", "stop"}
"""Commands that fail if the page has started no shared host."""
MISSING: Final = 77
"""Exit code: a package that a block imports is not installed."""
OPTIONAL: Final = {"trio", "gevent", "fastapi", "prometheus_client"}
SKIP: Final = re.compile(r'<!-- skip: \w+ "(.+)" -->')


def run_python(example: Example) -> None:
    source = pad(example.parsed, example.line + example.parsed.line_offset)
    code = compile(source, example.path, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    result = eval(code, example.namespace)
    if inspect.iscoroutine(result):
        if "trio" in code.co_names:
            importlib.import_module("trio").run(_awaited, result)
        else:
            asyncio.run(result)


async def _awaited(coroutine: object) -> None:
    await coroutine  # type: ignore[misc]


def read_toml(example: Example) -> None:
    reader.parse(str(example.parsed), str(Path.cwd()))


def run_commands(example: Example) -> None:
    for words in commands(str(example.parsed)):
        own, _ = split(words) if words[:1] == ["run"] else (words, [])
        try:
            cli.parser().parse_args(own)
        except SystemExit as end:
            assert not end.code, f"onnx-dl does not take {shlex.join(words)!r}"
        if words[0] in RUN and (words[0] not in NEED_A_HOST or running_hosts.running()):
            done = subprocess.run([sys.executable, "-m", "onnx_dl", *words], timeout=60, check=False)
            assert done.returncode == 0, f"onnx-dl {shlex.join(words)} ended with {done.returncode}"


def commands(text: str) -> Iterable[list[str]]:
    """The arguments of each ``onnx-dl`` in a block of a shell, without what is printed."""
    lines = text.replace("\\\n", " ").splitlines()
    typed = [line[2:] for line in lines if line.startswith("$ ")] or lines
    for line in typed:
        if line[:1].isspace():  # a table, or output
            continue
        for part in re.split(r" && | ; | \| | &$| > ", line.split(" #")[0]):
            if found := re.match(r"(?:\w+=\S* +)*onnx-dl +([a-z-].*)", part):
                yield shlex.split(found[1])


RUNNERS: Final[dict[str, Callable[[Example], None]]] = {
    "python": run_python,
    "toml": read_toml,
    "sh": run_commands,
    "console": run_commands,
    "": run_commands,
}
_blocks = FencedCodeBlockLexer(language=r"\w*", mapping={"language": "language", "source": "source"})


def blocks(document: Document) -> Iterable[Region]:
    for found in _blocks(document):
        if runner := RUNNERS.get(found.lexemes["language"]):
            yield Region(found.start, found.end, found.lexemes["source"], runner)


def is_run(text: str) -> bool:
    """True if a page has something to run."""
    found = _blocks(Document(text, ""))
    return any(
        region.lexemes["language"] in ("python", "toml")
        or (region.lexemes["language"] in RUNNERS and list(commands(region.lexemes["source"])))
        for region in found
    )


def run_page(path: str) -> int:
    document = Document.parse(path, blocks, SkipParser())
    document.namespace.update(
        np=np, onnx_dl=onnx_dl, InferenceSessionProxy=onnx_dl.InferenceSessionProxy, __name__="__main__"
    )
    for example in document.examples():
        try:
            example.evaluate()
        except SkipTest:
            continue
        except ModuleNotFoundError as error:
            if error.name not in OPTIONAL:
                raise
            print(error)
            return MISSING
    return 0


if __name__ == "__main__":
    try:
        code = run_page(sys.argv[1])
    finally:
        for host in running_hosts.running():
            onnx_dl.connect(host.name, start=False).stop()
    sys.exit(code)
