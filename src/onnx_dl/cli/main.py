"""The command ``onnx-dl``: runs one command, and returns its exit code.  Modules beside it do the work."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NoReturn

from onnx_dl.cli import output
from onnx_dl.cli.grammar import parser
from onnx_dl.cli.run import prepare, split
from onnx_dl.core import parsing
from onnx_dl.errors import OnnxDLError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return output.run_guarded(lambda: _command(words))


def _command(words: list[str]) -> int:
    own, program = split(words) if words[:1] == ["run"] else (words, [])
    with output.buffered_stdout():
        arguments = parser().parse_args(own)
    if arguments.command is None:
        parser().print_help(sys.stderr)
        return 2
    arguments.program = program
    try:
        return _COMMANDS[arguments.command](arguments) or 0
    except OnnxDLError as error:
        output.print_error(error)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(arguments: argparse.Namespace) -> NoReturn:
    prepare(
        arguments.program,
        settings=arguments.settings,
        memory_limit=arguments.memory_limit,
        host=arguments.host,
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
        _host(arguments),
        memory_limit=None if limit is None else parsing.parse_size(limit),
        config=None if file is None else os.path.abspath(file),
        metrics=arguments.metrics,
    )


def _serve(arguments: argparse.Namespace) -> int:
    from onnx_dl.cli.serve import serve

    return serve({name: value for name, value in vars(arguments).items() if value is not None})


def _stop(arguments: argparse.Namespace) -> None:
    from onnx_dl.cli import hosts

    hosts.stop(_host(arguments), all_versions=arguments.all_versions)


def _demo(_: argparse.Namespace) -> None:
    from onnx_dl.demo.show import demo
    from onnx_dl.system import resources

    resources.check_platform()  # it compares a worker process with a session in-process
    demo(output.console())


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

    seconds = None if arguments.seconds is None else parsing.parse_span(arguments.seconds)
    follows = arguments.follow or seconds is not None
    with hosts.connected(_host(arguments)) as host:
        events(host, as_json=arguments.json, lines=arguments.lines, follows=follows, seconds=seconds)


def _load(arguments: argparse.Namespace) -> None:
    from onnx_dl.cli import hosts, models

    ttl = None if arguments.ttl is None else parsing.parse_ttl(arguments.ttl)
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


def _completion(arguments: argparse.Namespace) -> None:
    import shtab

    output.print_line(shtab.complete(parser(), arguments.shell))


_COMMANDS: Final[Mapping[str, Callable[[argparse.Namespace], int | None]]] = {
    "demo": _demo,
    "run": _run,
    "load": _load,
    "pin": _load,
    "unload": _unload,
    "ps": _ps,
    "top": _top,
    "events": _events,
    "supervise": _supervise,
    "serve": _serve,
    "stop": _stop,
    "cache": _cache,
    "doctor": _doctor,
    "completion": _completion,
}
