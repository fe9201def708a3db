"""``onnx-dl serve``: options of the command line and of ``host.toml``, for the server.

The file is read here: the server's own packages know no file of a host.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from onnx_dl.core import parsing
from onnx_dl.errors import ConfigError, PlatformError
from onnx_dl.server.options import FileModel, ServeOptions
from onnx_dl.supervisor.hostfile import reader
from onnx_dl.system import resources

NEEDED: Final = ("httptools", "starlette", "grpc", "google.protobuf")
"""Modules of the extra ``serve`` without which the server does not start."""
_ADDRESSES: Final = ("http", "grpc", "metrics")
_PATHS: Final = ("token_file", "tls_cert", "tls_key", "tls_ca", "config")
_PARSERS: Final[Mapping[str, Callable[[object], object]]] = {
    "memory_limit": parsing.parse_size,
    "max_body": parsing.parse_size,
    "max_in_flight": parsing.parse_size,
    "drain_timeout": parsing.parse_time,
    "poll_every": parsing.parse_span,
}


def serve(given: Mapping[str, Any]) -> int:
    """Serves until SIGTERM or Ctrl-C; returns the exit code.

    ``given``: options of the command line that were given, by the names of fields of
    :class:`~onnx_dl.server.options.ServeOptions`.

    Raises:
        ConfigError: (a ValueError) an option, or the file that ``config`` names, is not valid.
        PlatformError: the extra is not installed, or this system has no worker processes.
    """
    resources.check_platform()
    options = options_of(given)
    check_installed(NEEDED)
    # grpcio reads it when it is imported.  By default it writes a line to stderr for each handshake that
    # fails, and anyone who can connect can make them fail.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from onnx_dl.server.app import serve as run

    return run(options)


def check_installed(modules: Sequence[str]) -> None:
    """Raises PlatformError if one of these modules is not installed."""
    missing = [name for name in modules if not is_installed(name)]
    if missing:
        raise PlatformError(
            f"onnx-dl serve needs {' and '.join(missing)}, which this Python does not have. Run: "
            'pip install "onnx-dl[serve]"'
        )


def options_of(given: Mapping[str, Any]) -> ServeOptions:
    """The options of a server: those of the command line, then those of the file, then the defaults.

    Raises:
        ConfigError: one is not valid, or the file is not.
    """
    own = _parsed({name: value for name, value in given.items() if name in ServeOptions.__struct_fields__})
    in_file: dict[str, Any] = {}
    if file := own.get("config"):
        read = reader.read(file)
        in_file = read.serve
        own["file_models"] = [
            FileModel(name=name, spec=model.spec, terms=model.terms, is_eager=model.eager)
            for name, model in read.models.items()
        ]
    options = msgspec.convert({**in_file, **own}, ServeOptions, from_attributes=True)
    _check(options)
    return options


def _parsed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the command line as values: bytes, seconds, absolute paths."""
    found: dict[str, Any] = dict(given)
    for name in _ADDRESSES:
        if name in found:
            found[name] = _address(found[name])
    for name, parse in _PARSERS.items():
        if name in found:
            found[name] = parse(found[name])
    for name in _PATHS:
        if name in found:
            found[name] = os.path.abspath(os.path.expanduser(found[name]))
    if "repository" in found:
        found["repository"] = [os.path.abspath(os.path.expanduser(path)) for path in found["repository"]]
    if "models" in found:
        found["models"] = _models(found["models"])
    return found


def _models(words: Sequence[str]) -> dict[str, str]:
    """Paths by name, of words such as ``digits=models/digits.onnx``."""
    found: dict[str, str] = {}
    for word in words:
        name, _, path = word.partition("=")
        if not path or not _is_name(name):
            raise ConfigError(
                f"--model {word!r} is not NAME=PATH, such as digits=models/digits.onnx; a name is printable "
                "text without / and \\."
            )
        if name in found:
            raise ConfigError(f"--model {name} is given twice.")
        found[name] = os.path.abspath(os.path.expanduser(path))
        if not os.path.isfile(found[name]):
            raise ConfigError(f"--model {word!r}: there is no file {found[name]}.")
    return found


def _check(options: ServeOptions) -> None:
    """Raises ConfigError for options that do not go together."""
    for path in options.repository:
        if not os.path.isdir(path):
            raise ConfigError(f"The repository {path} is not a folder.")
    if not options.http and not options.grpc:
        raise ConfigError(
            "Both HTTP and gRPC are off: there is nothing to serve. Give one of them an address."
        )
    if not (options.repository or options.models or options.file_models or options.demo):
        raise ConfigError(
            "There is no model to serve: give --repository DIR, --model NAME=PATH, --config FILE with "
            "models, or --demo."
        )
    if options.load_models and options.model_control != "explicit":
        raise ConfigError("--load-model is for --model-control explicit; otherwise all models are served.")
    if bool(options.tls_cert) != bool(options.tls_key):
        raise ConfigError("--tls-cert and --tls-key go together: give both, or none.")
    if options.tls_ca and not options.tls_cert:
        raise ConfigError("--tls-ca needs --tls-cert and --tls-key.")


def _address(text: str) -> str:
    """An address; empty if it is ``off``."""
    if text == "off":
        return ""
    parsing.parse_address(text)
    return text


def _is_name(name: str) -> bool:
    is_plain = name.isprintable() and not set(name) & set("/\\") and name not in (".", "..")
    return bool(name.strip()) and is_plain


def is_installed(module: str) -> bool:
    """True if it can be imported; nothing is imported but the packages that it is in."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False
