"""Options of ``onnx-dl serve`` as they stand on the command line, with their help."""

from __future__ import annotations

from typing import Final, NamedTuple


class Word(NamedTuple):
    """One option.

    Attributes:
        metavar: what stands for its value; empty: it has choices, or is a flag.
        field: name in ``ServeOptions``; empty: that of the option.
        is_list: it can be given several times.
    """

    option: str
    help: str
    metavar: str = ""
    choices: tuple[str, ...] = ()
    field: str = ""
    is_list: bool = False


_ADDRESS: Final = "HOST:PORT"

GROUPS: Final = {
    "models": (
        Word(
            "--repository",
            "a folder of models in Triton's layout, NAME/VERSION/model.onnx; can be given several times",
            "DIR", is_list=True,
        ),
        Word(
            "--model", "serve this file by this name; can be given several times", "NAME=PATH",
            field="models", is_list=True,
        ),
        Word(
            "--config",
            "a host.toml; its models are served, too, and its table [serve] has the options that are not "
            "given here",
            "FILE",
        ),
        Word("--demo", "serve the models of onnx-dl demo, and print commands to try"),
        Word(
            "--model-control",
            "none: read the repository at the start; poll: follow its changes; explicit: clients load and "
            "unload models (default: none)",
            choices=("none", "poll", "explicit"),
        ),
        Word(
            "--load-model",
            "with explicit: load this model at the start; '*': all; can be given several times",
            "NAME", field="load_models", is_list=True,
        ),
        Word("--poll-every", "time between two looks with poll (default: 2)", "TIME"),
        Word("--strict-readiness", "the server is ready only if all models are"),
    ),
    "addresses": (
        Word("--http", "HTTP; port 0: a free one, off: none (default: 127.0.0.1:8000)", _ADDRESS),
        Word("--grpc", "gRPC, likewise (default: 127.0.0.1:8001)", _ADDRESS),
        Word("--metrics", "/metrics at an address of its own, beside that of HTTP (default: off)", _ADDRESS),
    ),
    "processes and limits": (
        Word(
            "--host",
            "name of a shared host that runs the models, and stays (default: a host of the server's own)",
            "NAME",
        ),
        Word(
            "--memory-limit",
            "memory that all models together may take, for example 2GiB (default: four fifths of the memory "
            "of the machine or its cgroup)",
            "SIZE",
        ),
        Word("--processes", "processes that take requests, 1 to 64 (default: 1)", "N"),
        Word("--max-body", "bytes of one request (default: 1GiB)", "SIZE"),
        Word(
            "--max-queue-size",
            "requests of one model that wait or run; more get 429 (default: 64 or more, by the model)",
            "N",
        ),
        Word(
            "--max-in-flight",
            "bytes of all requests that are read or run (default: a quarter of the memory limit)",
            "SIZE",
        ),
        Word("--drain-timeout", "time that running requests have after SIGTERM (default: 30)", "TIME"),
        Word("--server-name", "name in the metadata (default: onnx-dl)", "NAME"),
    ),
    "who may do what": (
        Word(
            "--client-shm",
            "use of clients' shared memory: copy reads and writes it, map lets the worker use it in place, "
            "where a client that truncates it ends the worker (default: off)",
            choices=("off", "copy", "map"),
        ),
        Word(
            "--token-file",
            "tokens, one a line: NAME:SHA256:SCOPES; scopes are infer, control, shm, metrics, dashboard",
            "FILE",
        ),
        Word("--insecure", "serve another address than loopback without tokens"),
        Word("--tls-cert", "certificate of the server, PEM", "FILE"),
        Word("--tls-key", "its key, PEM", "FILE"),
        Word("--tls-ca", "clients must show a certificate of this CA, PEM", "FILE"),
    ),
}  # fmt: skip
"""All options by the heading in the help.  Tests compare them with ``ServeOptions`` and with ``[serve]``."""
