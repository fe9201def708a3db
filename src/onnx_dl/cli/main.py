"""The command ``onnx-dl``.

Covers arguments and exit codes; what a command does is in the module that it names.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

import onnx_dl
from onnx_dl.cli import output
from onnx_dl.cli.run import prepare, split
from onnx_dl.core import parsing, settings
from onnx_dl.core.text import format_bytes
from onnx_dl.errors import ConfigError, OnnxDLError

if TYPE_CHECKING:
    from onnx_dl.workers.load_cache.store import Cache


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    ps_module = argparse.ArgumentParser(
        prog="onnx-dl",
        description="onnxruntime sessions that live in worker processes and give all their memory back.",
    )
    ps_module.add_argument("--version", action="version", version=f"onnx-dl {onnx_dl.__version__}")
    commands = ps_module.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo", help="load, use and unload four models, beside the same work in-process"
    )
    demo.set_defaults(run=_demo)
    run = commands.add_parser(
        "run", help="run a program with onnxruntime.InferenceSession's models in worker processes",
        usage="onnx-dl run [OPTION ...] PROGRAM ...", allow_abbrev=False,
        epilog="PROGRAM ... is what stands behind python: file.py, -m MODULE, -c CODE or -, and arguments.",
    )  # fmt: skip
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
    run.set_defaults(run=_run)
    supervise = commands.add_parser(
        "supervise", help="run a host that several applications share, until Ctrl-C or SIGTERM"
    )
    supervise.add_argument(
        "--name", default="default", type=_host_name, help="under which onnx_dl.connect() finds it"
    )
    supervise.add_argument("--memory-limit", metavar="SIZE", help="all models together, e.g. 2GiB")
    supervise.add_argument("--config", metavar="FILE", help="a host.toml: which models it has, and limits")
    supervise.add_argument("--metrics", metavar="ADDRESS", help="serve Prometheus there, e.g. 127.0.0.1:9464")
    supervise.set_defaults(run=_supervise)
    store_module = commands.add_parser("cache", help="the load cache: models in the form that loads fastest")
    actions = store_module.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("ls", help="list what is in it, the one used last first").set_defaults(run=_cache_ls)
    actions.add_parser("clear", help="remove everything in it").set_defaults(run=_cache_clear)
    _add_host_commands(commands)
    doctor = commands.add_parser(
        "doctor", help="check what onnx-dl stands on: onnxruntime, providers, GPU, limits, how workers start"
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object")
    doctor.set_defaults(run=_doctor)
    return ps_module


def _add_host_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Commands about a shared host."""

    def add(
        name: str, run: Callable[[argparse.Namespace], None], about: str, *, model: bool = False
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about)
        command.add_argument(
            "--host",
            metavar="NAME",
            type=_host_name,
            help="of the shared host; else ONNX_DL_HOST, else 'default'",
        )
        if model:
            command.add_argument(
                "model", metavar="MODEL", help="a model file, or the name of a model in the host's config"
            )
        command.set_defaults(run=run)
        return command

    ps = add("ps", _ps, "list the models of a shared host")
    ps.add_argument("--json", action="store_true", help="the snapshot and the hosts as one JSON object")
    ps_module = add("top", _top, "watch the models of a shared host, and their memory over time")
    ps_module.add_argument("--interval", metavar="S", default="2", help="seconds between two pictures (2)")
    events = add("events", _events, "print what happens in a shared host; nothing of the past is kept")
    events.add_argument("--json", action="store_true", help="each event as one JSON object per line")
    until = events.add_mutually_exclusive_group(required=True)
    until.add_argument("--follow", action="store_true", help="until Ctrl-C, or until the host ends")
    until.add_argument("--for", dest="seconds", metavar="S", help="for so many seconds")
    for name, about in (
        ("load", "load a model, starting the host if need be, and have the host hold it"),
        ("pin", "the same; the model is not evicted to make room for others"),
    ):
        load = add(name, _load, about, model=True)
        load.add_argument(
            "--ttl", help="seconds without use after which it unloads, e.g. 60 or 5m; -1: stays"
        )
        load.add_argument("--priority", type=int, help="models of a lower one make room first")
        load.add_argument(
            "--env",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="a variable for the model's worker; can be given several times",
        )
    unload = add("unload", _unload, "unload a model, for all who use it", model=True)
    stop = add("stop", _stop, "end a shared host and all its models, for everybody")
    stop.add_argument(
        "--all-versions", action="store_true", help="and those of that name of other versions of onnx-dl"
    )
    unload.add_argument("--force", action="store_true", help="do not wait for calls that run: they fail")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return output.guarded(lambda: _command(words))


def _command(words: list[str]) -> int:
    own, program = split(words) if words[:1] == ["run"] else (words, [])
    with output.held_back():
        arguments = parser().parse_args(own)
    arguments.program = program
    try:
        return arguments.run(arguments) or 0
    except OnnxDLError as error:
        output.complain(error)
        return 1
    except KeyboardInterrupt:
        return 130


def _host_name(text: str) -> str:
    """The name of a host, or an error about the command line."""
    from onnx_dl.transport.rendezvous import checked_name

    try:
        return checked_name(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _run(arguments: argparse.Namespace) -> NoReturn:
    prepare(
        arguments.program,
        settings=arguments.settings,
        memory_limit=arguments.memory_limit,
        ttl=arguments.ttl,
        latency=arguments.latency,
        eager=not arguments.lazy,
    ).take_over()


def _supervise(arguments: argparse.Namespace) -> None:
    from onnx_dl.cli.supervise import supervise

    limit = arguments.memory_limit
    file = arguments.config
    if arguments.metrics is not None:
        parsing.parse_address(arguments.metrics)
    supervise(
        arguments.name,
        memory_limit=None if limit is None else str(parsing.parse_size(limit)),
        config=None if file is None else os.path.abspath(file),
        metrics=arguments.metrics,
    )


def _stop(arguments: argparse.Namespace) -> None:
    from onnx_dl.cli import stop as stop_module

    stop_module.stop(_host(arguments), all_versions=arguments.all_versions)


def _demo(_: argparse.Namespace) -> None:
    from onnx_dl.demo.show import demo

    demo()


def _cache_ls(_: argparse.Namespace) -> None:
    store = _cache()
    entries = store.entries()
    for entry in entries:
        used = datetime.datetime.fromtimestamp(entry.used).isoformat(" ", "minutes")
        output.say(f"{format_bytes(entry.nbytes):>12}  {used}  {entry.meta.name}")
    output.say(
        f"{len(entries)} models, {format_bytes(sum(entry.nbytes for entry in entries))}, in {store.root}"
    )


def _cache_clear(_: argparse.Namespace) -> None:
    store = _cache()
    output.say(f"{format_bytes(store.clear())} removed from {store.root}")


def _host(arguments: argparse.Namespace) -> str:
    from onnx_dl.cli.hosts import default_name

    return arguments.host or default_name()


def _ps(arguments: argparse.Namespace) -> None:
    from onnx_dl.cli import ps as ps_module

    ps_module.ps(_host(arguments), as_json=arguments.json)


def _top(arguments: argparse.Namespace) -> None:
    from onnx_dl.cli import hosts
    from onnx_dl.cli import ps as ps_module

    interval = parsing.parse_span(arguments.interval)
    with hosts.running(_host(arguments)) as host:
        ps_module.top(host, interval)


def _events(arguments: argparse.Namespace) -> None:
    from onnx_dl.cli import events as events_module
    from onnx_dl.cli import hosts

    seconds = None if arguments.follow else parsing.parse_span(arguments.seconds)
    with hosts.running(_host(arguments)) as host:
        events_module.events(host, as_json=arguments.json, seconds=seconds)


def _load(arguments: argparse.Namespace) -> None:
    from onnx_dl.cli import hosts, models

    ttl = None if arguments.ttl is None else parsing.parse_ttl(parsing.plain_number(arguments.ttl))
    with hosts.started(_host(arguments)) as host:
        pin = True if arguments.command == "pin" else None
        terms = {"ttl": ttl, "pin": pin, "priority": arguments.priority}
        models.load(host, arguments.model, **terms, environment=arguments.env)


def _unload(arguments: argparse.Namespace) -> None:
    from onnx_dl.cli import hosts, models

    with hosts.running(_host(arguments)) as host:
        models.unload(host, arguments.model, force=arguments.force)


def _doctor(arguments: argparse.Namespace) -> int:
    from onnx_dl.cli.doctor import collect, report

    findings = collect.examine()
    report.show(findings, as_json=arguments.json)
    return int(report.has_problems(findings))


def _cache() -> Cache:
    from onnx_dl.workers.load_cache import store as store_module

    return store_module.Cache(store_module.folder(), parsing.parse_size(settings.settings().cache_limit))


if __name__ == "__main__":
    sys.exit(main())
