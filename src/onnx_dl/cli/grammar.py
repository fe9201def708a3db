"""Grammar of the command line: commands, their options, and what shells complete."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Final

from onnx_dl.cli import serve_words
from onnx_dl.cli.help_texts import COMMANDS, WHOLE, HelpText
from onnx_dl.core.version import __version__
from onnx_dl.errors import ConfigError

if TYPE_CHECKING:
    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]

SHELLS: Final = ("bash", "zsh", "tcsh")
_FILE: Final = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}
_FOLDER: Final = {"bash": "_shtab_compgen_dirs", "zsh": "_files -/", "tcsh": "d"}
"""``shtab.FILE`` and ``shtab.DIRECTORY``, without an import of shtab for every command."""


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    whole = argparse.ArgumentParser(
        prog="onnx-dl", usage="onnx-dl [-h] [--version] COMMAND ...", **_help(WHOLE)
    )
    whole.add_argument("--version", action="version", version=f"onnx-dl {__version__}")
    commands = whole.add_subparsers(
        prog="onnx-dl", dest="command", metavar="COMMAND [ARGUMENT ...]", title="commands"
    )
    _add(commands, "demo")
    _add_run(commands)
    _add_load(_add(commands, "load"))
    _add_load(_add(commands, "pin"))
    _add_unload(commands)
    _add_views(commands)
    _add_supervise(commands)
    _add_serve(commands)
    stop = _add(commands, "stop")
    _add_host(stop)
    stop.add_argument(
        "--all-versions", action="store_true", help="also end hosts of this name of other onnx-dl versions"
    )
    actions = _add(commands, "cache").add_subparsers(
        dest="action", required=True, metavar="ACTION", title="actions"
    )
    actions.add_parser("ls", help="list the cached models, the last used first")
    actions.add_parser("clear", help="remove all cached models")
    _add_json(_add(commands, "doctor"), "print one JSON object")
    _add(commands, "completion").add_argument("shell", choices=SHELLS, help="the shell")
    return whole


def _help(text: HelpText) -> dict[str, Any]:
    examples = "\n".join(f"  {line}".rstrip() for line in text.examples.splitlines())
    return {
        "description": text.description,
        "epilog": f"examples:\n{examples}",
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def _add(commands: _Commands, name: str, **more: object) -> argparse.ArgumentParser:
    return commands.add_parser(
        name, help=COMMANDS[name].summary, **_help(COMMANDS[name]), **more  # type: ignore[arg-type]
    )  # fmt: skip


def _add_host(command: argparse.ArgumentParser, otherwise: str = "'default'") -> None:
    """Adds ``--host``.  ``otherwise``: the host if neither it nor ONNX_DL_HOST is given."""
    command.add_argument(
        "--host", metavar="NAME", type=_host_name,
        help=f"name of the shared host (default: the value of ONNX_DL_HOST, else {otherwise})",
    )  # fmt: skip


def _add_file(command: argparse.ArgumentParser, *names: str, **more: object) -> None:
    """Adds an argument that shells complete with names of files."""
    command.add_argument(*names, **more).complete = _FILE  # type: ignore[arg-type, attr-defined]


def _add_json(command: argparse.ArgumentParser, about: str) -> None:
    command.add_argument("--json", action="store_true", help=about)


def _add_memory_limit(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--memory-limit", metavar="SIZE",
        help="memory that all models together may take, for example 2GiB "
        "(default: four fifths of the memory of the machine or its cgroup)",
    )  # fmt: skip


def _add_run(commands: _Commands) -> None:
    run = _add(commands, "run", usage="onnx-dl run [OPTION ...] PROGRAM [ARGUMENT ...]", allow_abbrev=False)
    run.add_argument(
        "--ttl", default="-1", metavar="TIME",
        help="unload a model after this time without use, for example 60 or 5m; 0: after each use; "
        "-1: never (default: -1)",
    )  # fmt: skip
    _add_memory_limit(run)
    run.add_argument(
        "--latency",
        default="auto",
        metavar="MODE",
        help="auto, normal or low: whether calls wait by polling, which makes small calls faster and uses "
        "more CPU time (default: auto, where it pays and a core is free)",
    )
    run.add_argument("--lazy", action="store_true", help="load a model at its first call, not earlier")
    run.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="GLOB:NAME=VALUE",
        help="set ttl, latency, eager, isolation, sandbox or sha256 for models with such file names, for "
        "example 'vad*.onnx:ttl=-1' or 'tiny*:isolation=off'; can be given several times",
    )  # fmt: skip
    _add_host(run, "a private host")
    # Only for help and completion: the words of the program never reach this parser.
    _add_file(run, "program", nargs="*", metavar="PROGRAM", help="the program and its arguments")


def _add_supervise(commands: _Commands) -> None:
    supervise = _add(commands, "supervise")
    _add_host(supervise)
    supervise.add_argument("--name", dest="host", type=_host_name, help=argparse.SUPPRESS)  # as --host
    _add_memory_limit(supervise)
    _add_file(supervise, "--config", metavar="FILE", help="a host.toml with models and limits")
    supervise.add_argument(
        "--metrics", metavar="ADDRESS",
        help="serve metrics for Prometheus at this address, for example 127.0.0.1:9464",
    )  # fmt: skip


def _add_serve(commands: _Commands) -> None:
    """Each option's ``dest`` is the name of its field in ``server.options``; None: it was not given."""
    serve = _add(commands, "serve")
    for title, options in serve_words.GROUPS.items():
        group = serve.add_argument_group(title)
        for word in options:
            _add_word(group, word)


def _add_word(group: argparse._ArgumentGroup, word: serve_words.Word) -> None:
    more: dict[str, Any] = {"help": word.help, "dest": word.field or word.option[2:].replace("-", "_")}
    if word.metavar:
        more |= {"metavar": word.metavar, "action": "append" if word.is_list else "store"}
    elif word.choices:
        more |= {"choices": word.choices}
    else:
        more |= {"action": "store_true", "default": None}
    if (checks := {"host": _host_name, "processes": _processes, "max_queue_size": _count}).get(more["dest"]):
        more["type"] = checks[more["dest"]]
    argument = group.add_argument(word.option, **more)
    if completion := {"FILE": _FILE, "NAME=PATH": _FILE, "DIR": _FOLDER}.get(word.metavar):
        argument.complete = completion  # type: ignore[attr-defined]


def _add_views(commands: _Commands) -> None:
    ps = _add(commands, "ps")
    _add_host(ps)
    _add_json(ps, "print the snapshot and the hosts as one JSON object")
    top = _add(commands, "top")
    _add_host(top)
    top.add_argument("--interval", metavar="TIME", default="2", help="time between updates (default: 2)")
    events = _add(commands, "events")
    _add_host(events)
    _add_json(events, "print each event as one JSON object on one line")
    until = events.add_mutually_exclusive_group()
    until.add_argument(
        "-f", "--follow", action="store_true", help="then print new events, until Ctrl-C or the host ends"
    )
    until.add_argument("--for", dest="seconds", metavar="TIME", help="then print new events for this time")
    events.add_argument(
        "-n", "--lines", metavar="N", type=_count,
        help="number of past events to print (default: 10 with --follow or --for, else all that the host "
        "keeps)",
    )  # fmt: skip


def _add_load(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    _add_host(command)
    command.add_argument(
        "--ttl",
        metavar="TIME",
        help="unload the model after this time without use, for example 60 or 5m; 0: after each use; "
        "-1: never (default: -1, or the value in host.toml)",
    )
    command.add_argument(
        "--priority", type=int, metavar="N", help="models of lower priority are evicted first (default: 0)"
    )
    command.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE",
        help="an environment variable for the model's worker; can be given several times",
    )  # fmt: skip


def _add_unload(commands: _Commands) -> None:
    unload = _add(commands, "unload")
    _add_model(unload)
    _add_host(unload)
    unload.add_argument("--force", action="store_true", help="do not wait for running calls; they fail")


def _add_model(command: argparse.ArgumentParser) -> None:
    _add_file(
        command, "model", metavar="MODEL", help="a model file, or the name of a model in the host's host.toml"
    )


def _host_name(text: str) -> str:
    """Checks the name of a host, for argparse."""
    from onnx_dl.transport.rendezvous import checked_name

    try:
        return checked_name(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    """A number from 0 on, for argparse."""
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number; give 0 or more.")
    return int(text)


def _processes(text: str) -> int:
    """A number of processes, for argparse."""
    if not (text.isascii() and text.isdecimal() and len(text) < 3 and 1 <= int(text) <= 64):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes; give 1 to 64.")
    return int(text)
