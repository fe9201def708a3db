"""The command ``onnx-dl``.

Covers arguments and exit codes; what a command does is in the module that it names.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from onnx_dl import config
from onnx_dl.errors import OnnxDLError
from onnx_dl.events import format_bytes

if TYPE_CHECKING:
    from onnx_dl.workers.cache import Cache


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(
        prog="onnx-dl",
        description="onnxruntime sessions that live in worker processes and give all their memory back.",
    )
    top.add_argument(
        "--version", action="version", version=f"onnx-dl {importlib.metadata.version('onnx-dl')}"
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo", help="load, use and unload four models, beside the same work in-process"
    )
    demo.set_defaults(run=_demo)
    cache = commands.add_parser("cache", help="the load cache: models in the form that loads fastest")
    actions = cache.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("ls", help="list what is in it, the one used last first").set_defaults(run=_cache_ls)
    actions.add_parser("clear", help="remove everything in it").set_defaults(run=_cache_clear)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        arguments.run()
    except OnnxDLError as error:
        print(f"onnx-dl: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _demo() -> None:
    from onnx_dl.demo.show import demo

    demo()


def _cache_ls() -> None:
    store = _cache()
    entries = store.entries()
    for entry in entries:
        used = datetime.datetime.fromtimestamp(entry.used).isoformat(" ", "minutes")
        print(f"{format_bytes(entry.nbytes):>12}  {used}  {entry.meta.name}")
    print(f"{len(entries)} models, {format_bytes(sum(entry.nbytes for entry in entries))}, in {store.root}")


def _cache_clear() -> None:
    store = _cache()
    print(f"{format_bytes(store.clear())} removed from {store.root}")


def _cache() -> Cache:
    from onnx_dl.workers import cache

    return cache.Cache(cache.folder(), config.parse_size(config.settings().cache_limit))


if __name__ == "__main__":
    sys.exit(main())
