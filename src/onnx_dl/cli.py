"""The command ``onnx-dl``.

Covers arguments and exit codes; what a command does is in the module that it names.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence
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
    run = commands.add_parser(
        "run", help="run a program with onnxruntime.InferenceSession's models in worker processes"
    )
    run.add_argument("--ttl", default="-1", help="seconds without use after which a model unloads")
    run.add_argument(
        "--memory-limit",
        metavar="SIZE",
        help="all models together, e.g. 2GiB: idle ones make room",
    )
    run.add_argument("--latency", default="normal", help="normal or low")
    run.add_argument("--lazy", action="store_true", help="load models at first use, not when they are opened")
    run.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="GLOB:NAME=VALUE",
        help="for models of that file name: ttl, latency, eager or in_process; e.g. 'vad*.onnx:ttl=-1'",
    )  # fmt: skip
    run.add_argument("-m", action="store_true", dest="module", help="the program is a module")
    run.add_argument("target", nargs=argparse.REMAINDER, metavar="PROGRAM ...", help="and its arguments")
    run.set_defaults(run=_run)
    supervise = commands.add_parser(
        "supervise", help="run a host that several applications share, until Ctrl-C or SIGTERM"
    )
    supervise.add_argument("--name", default="default", help="under which onnx_dl.connect() finds it")
    supervise.add_argument("--memory-limit", metavar="SIZE", help="all models together, e.g. 2GiB")
    supervise.add_argument("--config", metavar="FILE", help="a host.toml: which models it has, and limits")
    supervise.set_defaults(run=_supervise)
    stop = commands.add_parser("stop", help="end a shared host and all its models, for everybody")
    stop.add_argument("--host", default="default", metavar="NAME", help="which")
    stop.set_defaults(run=_stop)
    cache = commands.add_parser("cache", help="the load cache: models in the form that loads fastest")
    actions = cache.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("ls", help="list what is in it, the one used last first").set_defaults(run=_cache_ls)
    actions.add_parser("clear", help="remove everything in it").set_defaults(run=_cache_clear)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        program = arguments.run(arguments)
    except OnnxDLError as error:
        print(f"onnx-dl: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if program is not None:
        program()  # what it raises is its own
    return 0


def _run(arguments: argparse.Namespace) -> Callable[[], None]:
    from onnx_dl.launch import prepare

    return prepare(
        arguments.target,
        module=arguments.module,
        settings=arguments.settings,
        memory_limit=arguments.memory_limit,
        ttl=arguments.ttl,
        latency=arguments.latency,
        eager=not arguments.lazy,
    )


def _supervise(arguments: argparse.Namespace) -> None:
    from onnx_dl.supervise import supervise

    limit = arguments.memory_limit
    file = arguments.config
    supervise(
        arguments.name,
        memory_limit=None if limit is None else str(config.parse_size(limit)),
        config=None if file is None else os.path.abspath(file),
    )


def _stop(arguments: argparse.Namespace) -> None:
    from onnx_dl.host import connect

    connect(arguments.host, start=False).stop()


def _demo(_: argparse.Namespace) -> None:
    from onnx_dl.demo.show import demo

    demo()


def _cache_ls(_: argparse.Namespace) -> None:
    store = _cache()
    entries = store.entries()
    for entry in entries:
        used = datetime.datetime.fromtimestamp(entry.used).isoformat(" ", "minutes")
        print(f"{format_bytes(entry.nbytes):>12}  {used}  {entry.meta.name}")
    print(f"{len(entries)} models, {format_bytes(sum(entry.nbytes for entry in entries))}, in {store.root}")


def _cache_clear(_: argparse.Namespace) -> None:
    store = _cache()
    print(f"{format_bytes(store.clear())} removed from {store.root}")


def _cache() -> Cache:
    from onnx_dl.workers import cache

    return cache.Cache(cache.folder(), config.parse_size(config.settings().cache_limit))


if __name__ == "__main__":
    sys.exit(main())
