"""The first process of ``onnx-dl serve``: puts the server together, prints where it listens, and ends it.

docs/architecture.md says which process owns what, and what happens when one of them dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import socket
import sys
import threading
from typing import Final, NoReturn

import msgspec

from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.core.parsing import parse_address
from onnx_dl.errors import ConfigError, OnnxDLError
from onnx_dl.host.model_host import ModelHost
from onnx_dl.protocol.failures import keep_engine_out
from onnx_dl.server import demo
from onnx_dl.server.auth import access, start
from onnx_dl.server.inference import limits
from onnx_dl.server.options import ServeOptions
from onnx_dl.server.processes import host as hosts
from onnx_dl.server.processes import logs
from onnx_dl.server.processes import messages as m
from onnx_dl.server.processes.children import Children
from onnx_dl.server.processes.front import Addresses, Front, Listeners, background, keep_host
from onnx_dl.server.processes.local_control import LocalControl
from onnx_dl.server.processes.loops import run
from onnx_dl.server.processes.remote_control import answered
from onnx_dl.server.repository.catalog import NamedModel
from onnx_dl.server.repository.repository import Repository
from onnx_dl.system import descriptor_limits
from onnx_dl.system.process_title import set_title

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MOST_CLOSING: Final = 15.0
"""Seconds after the time for draining until all is closed; then the process ends as it is."""


def serve(options: ServeOptions) -> int:
    """Serves until a signal, and returns the exit code.  Belongs to the main thread.

    Prints the addresses, one a line, then ``ready``: what loads at the start is loaded, or does not load.

    Raises:
        ConfigError: (a ValueError) the options do not allow a start.
        OnnxDLError: the host did not start.
    """
    logs.begin(is_first=True)
    keep_engine_out()
    set_title("server")
    descriptor_limits.raise_limit()  # each connection has one; child processes inherit it
    if options.demo:
        options = demo.with_models(options)
    try:
        rights = access.open_access(options, logs.tell)
        check_addresses(options)
        for sentence in start.warnings(options):
            logs.tell(sentence)
        return run(_Serving(options, rights).serve())
    except access.AccessError as error:
        raise ConfigError(str(error)) from None


def named(options: ServeOptions) -> list[NamedModel]:
    """The models of the ``host.toml``."""
    return [
        NamedModel(
            name=model.name,
            path=model.spec.where(""),
            place=f"{options.config}, models.{model.name}",
            spec=model.spec,
            terms=model.terms,
            is_eager=model.is_eager,
        )
        for model in options.file_models
    ]


def check_addresses(options: ServeOptions) -> None:
    """Tries all addresses before anything is started.

    Not only for a quick answer: with several processes the addresses are shared with those that bind them in
    the same way, and another server of this user would be one of them.

    Raises:
        ConfigError: an address cannot be had.
    """
    for what, address in (("HTTP", options.http), ("gRPC", options.grpc), ("metrics", options.metrics)):
        if address:
            _try(what, address)


def _try(what: str, address: str) -> None:
    name, port = parse_address(address)
    try:
        family, _, _, _, where = socket.getaddrinfo(
            name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(where)
    except OSError as error:
        raise ConfigError(f"{what} cannot listen at {address}: {error.strerror or error}.") from None


class _Serving:
    """One run of the server.  Makes its parts in order, and closes them in the reverse order."""

    def __init__(self, options: ServeOptions, rights: access.RequestAccess) -> None:
        self._options = options
        self._rights = rights
        self._stop: asyncio.Event
        self._closing = contextlib.AsyncExitStack()
        self._front: Front
        self._listeners = Listeners()
        self._listens = False
        self._children: Children

    async def serve(self) -> int:
        """Returns the exit code."""
        self._stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN or number != signal.SIGHUP:  # nohup
                loop.add_signal_handler(number, self._on_signal)
        stopped = loop.create_task(self._stop.wait())
        async with self._closing:
            starting = loop.create_task(self._start())
            await asyncio.wait([starting, stopped], return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                print("ready", flush=True)
                await stopped
            else:
                starting.cancel()
                await asyncio.wait([starting])
            if self._listens:  # also before it is ready: models that are there are served
                await self._drain()
        return 0

    def _on_signal(self) -> None:
        """The first signal drains.  At the second all ends as it is: children and host notice that."""
        if self._stop.is_set():
            _end_now()
        self._stop.set()

    async def _start(self) -> None:
        options, closing = self._options, self._closing
        host = await self._open_host()
        limit = (await asyncio.to_thread(host.snapshot)).memory_limit  # of the file, or of a named host
        page = limits.create_page(options.processes)
        closing.callback(os.close, page)
        counts = limits.Limits(
            options.max_in_flight or limits.default_max_bytes(limit),
            options.max_queue_size,
            fd=page,
            rows=options.processes,
        )
        self._front = front = Front(options, host, counts, self._rights)
        closing.callback(front.close)
        closing.enter_context(background(asyncio.get_running_loop().create_task(keep_host(host))))
        self._children = children = Children(counts, page)
        control = LocalControl(front, children)
        control.repository = Repository(options, host, front.table, control.publish, named(options))
        front.control = control
        closing.push_async_callback(control.repository.close)
        closing.push_async_callback(children.close)
        closing.push_async_callback(self._listeners.close)
        wanted = Addresses(options.http, options.grpc, options.metrics)
        try:
            actual = await self._listeners.start(front, wanted, reuse_port=options.processes > 1)
        except OSError as error:
            raise ConfigError(f"The server cannot listen: {error}.") from None
        self._listens = True
        self._tell(actual)
        await control.repository.start()
        begin = functools.partial(self._begin, host.name or "", actual)
        try:
            await children.start(
                options.processes - 1, begin, functools.partial(answered, control), front.regions
            )
        except OSError as error:
            raise ConfigError(str(error)) from None
        await control.repository.has_started.wait()
        if options.demo:
            is_open = not (options.tls_cert or options.token_file)
            print(demo.commands(actual.http if is_open else "", host.name or ""), flush=True)

    async def _open_host(self) -> ModelHost:
        """The host: one of this server's own, which ends with it, or the one that the user has named."""
        options = self._options
        if not options.host:
            hosts.claim()
        host = hosts.host_of(options, options.host or hosts.own_name())
        self._closing.push_async_callback(asyncio.to_thread, _close_host, host, is_own=not options.host)
        await asyncio.to_thread(host.start)
        return host

    def _begin(self, host: str, actual: Addresses, row: int) -> m.Begin:
        """The first message for the child of this row."""
        options = msgspec.structs.replace(
            self._options,
            http=actual.http,
            grpc=actual.grpc,
            metrics="",
            max_in_flight=self._front.limits.max_bytes,
        )
        return m.Begin(options=options, host=host, row=row, table=self._front.models.table)

    def _tell(self, actual: Addresses) -> None:
        scheme = "https" if self._options.tls_cert else "http"
        if actual.http:
            print(f"HTTP: {scheme}://{actual.http}")
        if actual.grpc:
            print(f"gRPC: {actual.grpc}")
        if actual.metrics:
            print(f"metrics: {scheme}://{actual.metrics}/metrics")
        sys.stdout.flush()

    async def _drain(self) -> None:
        """Finishes what was begun, in all processes, within the time for it."""
        seconds = self._options.drain_timeout
        _end_later(seconds + MOST_CLOSING)
        self._front.is_draining = True
        await asyncio.gather(self._listeners.drain(Deadline(seconds)), self._children.drain(seconds))


def _close_host(host: ModelHost, *, is_own: bool) -> None:
    """Ends a host of our own; leaves another."""
    with contextlib.suppress(OnnxDLError, TimeoutError):  # it ends with this process at the latest
        if is_own:
            host.stop()
    host.close()


def _end_later(seconds: float) -> None:
    """Ends this process after so many seconds, also if it only waits for threads then."""
    timer = threading.Timer(seconds, _end_now)
    timer.daemon = True
    timer.start()


def _end_now() -> NoReturn:
    """Ends this process as it is: its children and its own host end when they notice."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(1)
