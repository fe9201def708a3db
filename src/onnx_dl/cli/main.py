"""The command ``onnx-dl``: its arguments and exit codes.  Each command is a module of its own."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from onnx_dl.cli import output
from onnx_dl.cli.run import prepare, split
from onnx_dl.core import parsing
from onnx_dl.core.version import __version__
from onnx_dl.errors import ConfigError, OnnxDLError

if TYPE_CHECKING:
    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def parser() -> argparse.ArgumentParser:
    """The grammar of the command line."""
    whole = argparse.ArgumentParser(
        prog="onnx-dl",
        description="onnxruntime sessions that live in worker processes and give all their memory back.",
    )
    whole.add_argument("--version", action="version", version=f"onnx-dl {__version__}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo", help="load, use and unload four models, beside the same work in-process"
    )
    demo.set_defaults(run=_demo)
    _add_run(commands)
    _add_supervise(commands)
    cache = commands.add_parser("cache", help="the load cache: models in the form that loads fastest")
    actions = cache.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("ls", help="list its entries, the last used first")
    actions.add_parser("clear", help="remove all entries")
    cache.set_defaults(run=_cache)
    _add_views(commands)
    _add_changes(commands)
    doctor = commands.add_parser(
        "doctor", help="check the installation: onnxruntime, providers, GPU, limits, start of workers"
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object")
    doctor.set_defaults(run=_doctor)
    return whole


def _add_run(commands: _Commands) -> None:
    run = commands.add_parser(
        "run", help="run a program with onnxruntime.InferenceSession's models in worker processes",
        usage="onnx-dl run [OPTION ...] PROGRAM ...", allow_abbrev=False,
        epilog="PROGRAM ... is what follows python: file.py, -m MODULE, -c CODE or -, and arguments.",
    )  # fmt: skip
    run.add_argument("--ttl", default="-1", help="seconds without use after which a model unloads")
    run.add_argument(
        "--memory-limit", metavar="SIZE", help="of all models together, e.g. 2GiB: idle models make room"
    )
    run.add_argument("--latency", default="normal", help="normal or low")
    run.add_argument("--lazy", action="store_true", help="load models at first use, not when they are opened")
    run.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="GLOB:NAME=VALUE",
        help="for models of that file name: ttl, latency, eager or in_process; e.g. 'vad*.onnx:ttl=-1'",
    )  # fmt: skip
    run.set_defaults(run=_run)


def _add_supervise(commands: _Commands) -> None:
    supervise = commands.add_parser(
        "supervise", help="run a host that several applications share, until Ctrl-C or SIGTERM"
    )
    supervise.add_argument(
        "--name", default="default", type=_host_name, help="by which onnx_dl.connect() finds it"
    )
    supervise.add_argument("--memory-limit", metavar="SIZE", help="of all models together, e.g. 2GiB")
    supervise.add_argument("--config", metavar="FILE", help="a host.toml with its models and limits")
    supervise.add_argument(
        "--metrics", metavar="ADDRESS", help="serve Prometheus metrics there, e.g. 127.0.0.1:9464"
    )
    supervise.set_defaults(run=_supervise)


def _add_host_command(
    commands: _Commands, name: str, run: Callable[[argparse.Namespace], None], about: str
) -> argparse.ArgumentParser:
    """Adds a command for a shared host."""
    command = commands.add_parser(name, help=about)
    command.add_argument(
        "--host",
        metavar="NAME",
        type=_host_name,
        help="of the shared host; else ONNX_DL_HOST, else 'default'",
    )
    command.set_defaults(run=run)
    return command


def _add_views(commands: _Commands) -> None:
    ps = _add_host_command(commands, "ps", _ps, "list the models of a shared host")
    ps.add_argument("--json", action="store_true", help="the snapshot and the hosts as one JSON object")
    top = _add_host_command(
        commands, "top", _top, "watch the models of a shared host, and their memory over time"
    )
    top.add_argument("--interval", metavar="S", default="2", help="seconds between two updates (2)")
    events = _add_host_command(
        commands, "events", _events, "print what happens in a shared host, from now on"
    )
    events.add_argument("--json", action="store_true", help="each event as one JSON object per line")
    until = events.add_mutually_exclusive_group(required=True)
    until.add_argument("--follow", action="store_true", help="until Ctrl-C, or until the host ends")
    until.add_argument("--for", dest="seconds", metavar="S", help="for this many seconds")


def _add_changes(commands: _Commands) -> None:
    load = _add_host_command(
        commands, "load", _load, "load a model and have the host keep it; starts the host if none runs"
    )
    pin = _add_host_command(
        commands, "pin", _load, "the same; the model is not evicted to make room for others"
    )
    unload = _add_host_command(commands, "unload", _unload, "unload a model, for all its users")
    for command in (load, pin, unload):
        command.add_argument(
            "model", metavar="MODEL", help="a model file, or the name of a model in the host's config"
        )
    for command in (load, pin):
        command.add_argument(
            "--ttl", help="seconds without use after which it unloads, e.g. 60 or 5m; -1: never"
        )
        command.add_argument("--priority", type=int, help="models of lower priority are evicted first")
        command.add_argument(
            "--env",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="an environment variable of the model's worker; can be given several times",
        )
    unload.add_argument("--force", action="store_true", help="do not wait for running calls: they fail")
    stop = _add_host_command(commands, "stop", _stop, "end a shared host and all its models, for all users")
    stop.add_argument(
        "--all-versions", action="store_true", help="also the hosts of that name of other onnx-dl versions"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return output.run_guarded(lambda: _command(words))


def _command(words: list[str]) -> int:
    own, program = split(words) if words[:1] == ["run"] else (words, [])
    with output.buffered_stdout():
        arguments = parser().parse_args(own)
    arguments.program = program
    try:
        return arguments.run(arguments) or 0
    except OnnxDLError as error:
        output.print_error(error)
        return 1
    except KeyboardInterrupt:
        return 130


def _host_name(text: str) -> str:
    """Checks the name of a host, for argparse."""
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

    limit, file = arguments.memory_limit, arguments.config
    if arguments.metrics is not None:
        parsing.parse_address(arguments.metrics)
    supervise(
        arguments.name,
        memory_limit=None if limit is None else parsing.parse_size(limit),
        config=None if file is None else os.path.abspath(file),
        metrics=arguments.metrics,
    )


def _stop(arguments: argparse.Namespace) -> None:
    from onnx_dl.cli import hosts

    hosts.stop(_host(arguments), all_versions=arguments.all_versions)


def _demo(_: argparse.Namespace) -> None:
    from onnx_dl.demo.show import demo
    from onnx_dl.system import resources

    resources.check_platform()  # it compares a worker process with a session in-process
    demo()


def _cache(arguments: argparse.Namespace) -> None:
    from onnx_dl.cli import models

    {"ls": models.list_cached, "clear": models.clear_cache}[arguments.action]()


def _host(arguments: argparse.Namespace) -> str:
    from onnx_dl.cli.hosts import default_name

    return arguments.host or default_name()


def _ps(arguments: argparse.Namespace) -> None:
    from onnx_dl.cli.ps import ps

    ps(_host(arguments), as_json=arguments.json)


def _top(arguments: argparse.Namespace) -> None:
    from onnx_dl.cli import hosts
    from onnx_dl.cli.ps import top

    interval = parsing.parse_span(arguments.interval)
    with hosts.connected(_host(arguments)) as host:
        top(host, interval)


def _events(arguments: argparse.Namespace) -> None:
    from onnx_dl.cli import hosts
    from onnx_dl.cli.events import events

    seconds = None if arguments.follow else parsing.parse_span(arguments.seconds)
    with hosts.connected(_host(arguments)) as host:
        events(host, as_json=arguments.json, seconds=seconds)


def _load(arguments: argparse.Namespace) -> None:
    from onnx_dl.cli import hosts, models

    ttl = None if arguments.ttl is None else parsing.parse_ttl(parsing.plain_number(arguments.ttl))
    pin = True if arguments.command == "pin" else None
    terms = {"ttl": ttl, "pin": pin, "priority": arguments.priority}
    with hosts.connected(_host(arguments), start=True) as host:
        models.load(host, arguments.model, **terms, environment=arguments.env)


def _unload(arguments: argparse.Namespace) -> None:
    from onnx_dl.cli import hosts, models

    with hosts.connected(_host(arguments)) as host:
        models.unload(host, arguments.model, force=arguments.force)


def _doctor(arguments: argparse.Namespace) -> int:
    from onnx_dl.cli.doctor import collect, report

    findings = collect.examine()
    report.show(findings, as_json=arguments.json)
    return int(report.has_problems(findings))
