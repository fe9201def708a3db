"""Grammar of the command line: commands, their options, and what shells complete."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Final

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


def _add_file(command: argparse._ActionsContainer, *names: str, **more: object) -> None:
    """Adds an argument that shells complete with names of files."""
    command.add_argument(*names, **more).complete = _FILE  # type: ignore[arg-type, attr-defined]


def _add_folder(command: argparse._ActionsContainer, *names: str, **more: object) -> None:
    """Adds an argument that shells complete with names of folders."""
    command.add_argument(*names, **more).complete = _FOLDER  # type: ignore[arg-type, attr-defined]


def _add_json(command: argparse.ArgumentParser, about: str) -> None:
    command.add_argument("--json", action="store_true", help=about)


def _add_memory_limit(command: argparse._ActionsContainer) -> None:
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
    serve = _add(commands, "serve", argument_default=None)
    models = serve.add_argument_group("models")
    _add_folder(
        models,
        "--repository",
        action="append",
        metavar="DIR",
        help="a folder of models in Triton's layout, NAME/VERSION/model.onnx; can be given several times",
    )
    _add_file(
        models,
        "--model",
        action="append",
        dest="models",
        metavar="NAME=PATH",
        help="serve this file by this name; can be given several times",
    )
    _add_file(
        models,
        "--config",
        metavar="FILE",
        help="a host.toml; its models are served, too, and its "
        "table [serve] has the options that are not given here",
    )
    models.add_argument(
        "--demo",
        action="store_true",
        default=None,
        help="serve the models of onnx-dl demo, and print commands to try",
    )
    models.add_argument(
        "--model-control",
        choices=("none", "poll", "explicit"),
        help="none: read the repository at the start; poll: follow its changes; explicit: clients load and "
        "unload models (default: none)",
    )
    models.add_argument(
        "--load-model",
        action="append",
        dest="load_models",
        metavar="NAME",
        help="with explicit: load this model at the start; '*': all; can be given several times",
    )
    models.add_argument("--poll-every", metavar="TIME", help="time between two looks with poll (default: 2)")
    models.add_argument(
        "--strict-readiness",
        action="store_true",
        default=None,
        help="the server is ready only if all models are",
    )
    _add_addresses(serve.add_argument_group("addresses"))
    _add_limits_of_serve(serve.add_argument_group("processes and limits"))
    _add_rights_of_serve(serve.add_argument_group("who may do what"))


def _add_addresses(sockets: argparse._ArgumentGroup) -> None:
    where = {"metavar": "HOST:PORT"}
    sockets.add_argument(
        "--http", **where, help="HTTP; port 0: a free one, off: none (default: 127.0.0.1:8000)"
    )
    sockets.add_argument("--grpc", **where, help="gRPC, likewise (default: 127.0.0.1:8001)")
    sockets.add_argument(
        "--metrics", **where, help="/metrics at an address of its own, beside that of HTTP (default: off)"
    )


def _add_limits_of_serve(limits: argparse._ArgumentGroup) -> None:
    limits.add_argument(
        "--host",
        metavar="NAME",
        type=_host_name,
        help="name of a shared host that runs the models, and stays (default: a host of the server's own)",
    )
    _add_memory_limit(limits)
    limits.add_argument(
        "--processes", metavar="N", type=_processes, help="processes that take requests, 1 to 64 (default: 1)"
    )
    limits.add_argument("--max-body", metavar="SIZE", help="bytes of one request (default: 1GiB)")
    limits.add_argument(
        "--max-queue-size",
        metavar="N",
        type=_count,
        help="requests of one model that wait or run; more get 429 (default: 64 or more, by the model)",
    )
    limits.add_argument(
        "--max-in-flight",
        metavar="SIZE",
        help="bytes of all requests that are read or run (default: a quarter of the memory limit)",
    )
    limits.add_argument(
        "--drain-timeout", metavar="TIME", help="time that running requests have after SIGTERM (default: 30)"
    )
    limits.add_argument("--server-name", metavar="NAME", help="name in the metadata (default: onnx-dl)")


def _add_rights_of_serve(rights: argparse._ArgumentGroup) -> None:
    rights.add_argument(
        "--client-shm",
        choices=("off", "copy", "map"),
        help="use of clients' shared memory: copy reads and writes it, map lets the worker use it in place, "
        "where a client that truncates it ends the worker (default: off)",
    )
    _add_file(
        rights,
        "--token-file",
        metavar="FILE",
        help="tokens, one a line: NAME:SHA256:SCOPES; scopes are infer, control, shm, metrics, dashboard",
    )
    rights.add_argument(
        "--insecure",
        action="store_true",
        default=None,
        help="serve another address than loopback without tokens",
    )
    _add_file(rights, "--tls-cert", metavar="FILE", help="certificate of the server, PEM")
    _add_file(rights, "--tls-key", metavar="FILE", help="its key, PEM")
    _add_file(rights, "--tls-ca", metavar="FILE", help="clients must show a certificate of this CA, PEM")


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
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of them; give 0 or more.")
    return int(text)


def _processes(text: str) -> int:
    """A number of processes, for argparse."""
    if not (text.isascii() and text.isdecimal() and len(text) < 3 and 1 <= int(text) <= 64):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes; give 1 to 64.")
    return int(text)
