"""Options of ``onnx-dl serve``, checked once, where they enter."""

from __future__ import annotations

from typing import Literal

import msgspec

from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.terms import Terms

ModelControl = Literal["none", "poll", "explicit"]
ClientShm = Literal["off", "copy", "map"]


class FileModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model of a ``host.toml``: a proxy of it is made by ``InferenceSessionProxy.of_spec(spec, terms)``, so
    that it has the key, and the warm-up, of the model of that name in the host."""

    name: str
    spec: ModelSpec
    terms: Terms
    is_eager: bool = False


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of one server.  Addresses are "host:port"; port 0: a free one.  Sizes are bytes.

    Attributes:
        repository: folders in Triton's layout.
        models: more models by name: absolute paths of files.
        file_models: the models of the ``host.toml`` that ``config`` names.
        http, grpc, metrics: addresses; empty: not served.
        host: name of the shared host that the server is a client of; empty: one of its own.
        config: path of a ``host.toml``; its models are served, too.
        model_control: ``none``: the repository is read at the start; ``poll``: it is looked at every
            ``poll_every`` seconds; ``explicit``: only what clients load.
        load_models: names that ``explicit`` loads at the start; ``*``: all.
        strict_readiness: the server is ready only if all models are.
        server_name: name in the server's metadata.
        client_shm: how clients' shared memory is read: ``off``, ``copy`` (pread, pwrite) or ``map``.
        max_body: bytes of one request.
        processes: processes that accept requests.
        memory_limit: bytes that all models together may take; None: the host's default.
        max_queue_size: requests of one model that may wait or run; 0: the default of the model.
        max_in_flight: bytes of all requests that are read or run; 0: a quarter of the memory limit.
        drain_timeout: seconds that running requests have after SIGTERM.
        token_file: path of the file with tokens; empty: none.
        insecure: serve other addresses than loopback without tokens.
        tls_cert, tls_key, tls_ca: PEM files; ``tls_ca``: clients must show a certificate of it.
        demo: serve the demo's models.
    """

    repository: tuple[str, ...] = ()
    models: dict[str, str] = {}
    file_models: tuple[FileModel, ...] = ()
    http: str = "127.0.0.1:8000"
    grpc: str = "127.0.0.1:8001"
    metrics: str = ""
    host: str = ""
    config: str = ""
    model_control: ModelControl = "none"
    load_models: tuple[str, ...] = ()
    poll_every: float = 2.0
    strict_readiness: bool = False
    server_name: str = "onnx-dl"
    client_shm: ClientShm = "off"
    max_body: int = 1 << 30
    processes: int = 1
    memory_limit: int | None = None
    max_queue_size: int = 0
    max_in_flight: int = 0
    drain_timeout: float = 30.0
    token_file: str = ""
    insecure: bool = False
    tls_cert: str = ""
    tls_key: str = ""
    tls_ca: str = ""
    demo: bool = False
