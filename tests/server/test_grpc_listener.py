"""The listener's address, TLS, and limits of connections."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.server.auth.tls import grpc_credentials
from onnx_dl.server.grpc import health, listener
from onnx_dl.server.grpc.listener import GrpcListener
from onnx_dl.server.grpc.messages import HEALTH, INFERENCE
from onnx_dl.server.options import ServeOptions
from tests.server.grpc_rig import code_of, listening, raw_request
from tests.server.standin import StandIn, running_loop
from tests.support.serving import serving
from tests.support.slow import identity_model
from tests.support.waiting import DEADLINE, allowed, eventually

trustme = pytest.importorskip("trustme")


@pytest.fixture(scope="module", autouse=True)
def grpc_has_its_descriptors() -> None:
    """The library opens some at its first use, and keeps them."""
    with listening() as rig:
        assert infer(rig.channel)


def infer(channel: grpc.Channel) -> bytes:
    answer: bytes = channel.unary_unary(f"/{INFERENCE}/ModelInfer")(
        raw_request(), timeout=allowed(DEADLINE), wait_for_ready=True
    )
    return answer


@contextlib.contextmanager
def two_listeners() -> Iterator[tuple[GrpcListener, GrpcListener]]:
    with running_loop() as loop:
        both = GrpcListener(StandIn(), loop), GrpcListener(StandIn(), loop)
        try:
            yield both
        finally:
            for each in both:
                each.close()


def test_an_address_that_is_taken_is_an_oserror() -> None:
    with two_listeners() as (first, second):
        address = first.start("127.0.0.1:0")
        assert not address.endswith(":0")
        with pytest.raises(OSError, match=f"cannot listen on {address}"):
            second.start(address)


def test_processes_may_share_an_address() -> None:
    with two_listeners() as (first, second):
        address = first.start("127.0.0.1:0", reuse_port=True)
        assert second.start(address, reuse_port=True) == address
        with grpc.insecure_channel(address) as channel:
            assert infer(channel)


@pytest.mark.skipif(not socket.has_ipv6 or not os.path.exists("/proc/net/if_inet6"), reason="no IPv6")
def test_ipv6() -> None:
    with two_listeners() as (first, _):
        try:
            address = first.start("[::1]:0")
        except OSError:
            pytest.skip("no address of IPv6")
        assert address.startswith("[::1]:")
        with grpc.insecure_channel(address) as channel:
            assert infer(channel)


def test_a_listener_that_never_started_ends() -> None:
    with two_listeners() as (first, second):
        first.drain(Deadline(1))
        second.close()
        second.close()


def test_a_listener_without_calls_drains_at_once() -> None:
    with listening() as rig:
        assert infer(rig.channel)
        deadline = Deadline(10 * DEADLINE)
        rig.listener.drain(deadline)
        assert (left := deadline.left()) is not None and left > DEADLINE


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """PEM files: of the server, of a client of its authority, and of a client of another."""
    authority, another = trustme.CA(), trustme.CA()
    paths = {name: tmp_path / f"{name}.pem" for name in ("ca", "cert", "key")}
    authority.cert_pem.write_to_path(paths["ca"])
    issued = {
        "server": authority.issue_cert("localhost", common_name="server"),
        "client": authority.issue_cert("someone", common_name="a client"),
        "unnamed": authority.issue_cert("someone"),
        "stranger": another.issue_cert("someone", common_name="a stranger"),
    }
    issued["server"].cert_chain_pems[0].write_to_path(paths["cert"])
    issued["server"].private_key_pem.write_to_path(paths["key"])
    for name in ("client", "unnamed", "stranger"):
        paths[name] = tmp_path / f"{name}.pem"
        issued[name].private_key_and_cert_chain_pem.write_to_path(paths[name])
    return paths


def secure_channel(address: str, files: dict[str, Path], client: str | None = None) -> grpc.Channel:
    pem = files[client].read_bytes() if client else None
    credentials = grpc.ssl_channel_credentials(files["ca"].read_bytes(), pem, pem)
    return grpc.secure_channel(address, credentials, [("grpc.ssl_target_name_override", "localhost")])


def test_tls(files: dict[str, Path]) -> None:
    options = ServeOptions(tls_cert=str(files["cert"]), tls_key=str(files["key"]))
    with listening(options, grpc_credentials(options)) as rig:
        with secure_channel(rig.address, files) as channel:
            assert infer(channel)
        assert rig.server.access.callers[-1][1].certificate is None
        with pytest.raises(grpc.RpcError) as caught:
            rig.unary("ServerLive", b"")  # without TLS
        assert code_of(caught.value) == "UNAVAILABLE"


def test_certificates_of_clients(files: dict[str, Path]) -> None:
    options = ServeOptions(tls_cert=str(files["cert"]), tls_key=str(files["key"]), tls_ca=str(files["ca"]))
    with listening(options, grpc_credentials(options)) as rig:
        with secure_channel(rig.address, files, "client") as channel:
            assert infer(channel)
        assert "a client" in (rig.server.access.callers[-1][1].certificate or "")
        with secure_channel(rig.address, files, "unnamed") as channel:
            assert infer(channel)
        assert rig.server.access.callers[-1][1].certificate
        for name in (None, "stranger"):
            with secure_channel(rig.address, files, name) as channel:
                with pytest.raises(grpc.RpcError) as caught:
                    channel.unary_unary(f"/{INFERENCE}/ModelInfer")(raw_request(), timeout=allowed(DEADLINE))
                assert code_of(caught.value) == "UNAVAILABLE"


def test_failed_handshakes_fill_no_log(files: dict[str, Path], tmp_path: Path) -> None:
    (model := tmp_path / "model.onnx").write_bytes(identity_model())
    with serving("--model", f"m={model}", "--tls-cert", files["cert"], "--tls-key", files["key"]) as server:
        host, _, port = server.grpc.partition(":")
        for _ in range(3):
            with socket.create_connection((host, int(port)), timeout=allowed(DEADLINE)) as connection:
                connection.sendall(b"no handshake at all")
                with contextlib.suppress(ConnectionResetError):
                    while connection.recv(1 << 12):
                        pass
        with secure_channel(server.grpc, files) as channel:
            assert channel.unary_unary(f"/{INFERENCE}/ServerLive")(b"", timeout=allowed(DEADLINE))
        assert "andshake" not in server.output()


def test_more_watchers_than_there_are_places_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "MOST_WATCHERS", 2)
    with listening() as rig:
        watch = rig.channel.unary_stream(f"/{HEALTH}/Watch")
        watching = [watch(b"", timeout=60) for _ in range(2)]
        for each in watching:
            next(each)
        with pytest.raises(grpc.RpcError) as caught:
            next(watch(b"", timeout=60))
        assert code_of(caught.value) == "RESOURCE_EXHAUSTED"
        watching[0].cancel()
        eventually(lambda: rig.listener._health._watchers.taken == 1, "a free place")
        assert next(watch(b"", timeout=60))


def is_closed(connection: socket.socket) -> bool:
    """Whether the other end has closed it; what it sent before is dropped."""
    connection.setblocking(False)
    try:
        while connection.recv(1 << 16):
            pass
    except BlockingIOError:
        return False
    except ConnectionResetError:
        pass
    return True


def test_more_connections_than_allowed_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    options = listener._options

    def few(max_body: int, *, reuse_port: bool) -> list[tuple[str, int]]:
        given = dict(options(max_body, reuse_port=reuse_port))
        return list({**given, "grpc.max_allowed_incoming_connections": 3}.items())

    monkeypatch.setattr(listener, "_options", few)
    with listening() as rig:
        host, _, port = rig.address.partition(":")
        others = [socket.create_connection((host, int(port)), timeout=allowed(DEADLINE)) for _ in range(8)]
        try:
            eventually(lambda: sum(map(is_closed, others)) >= 5, "the end of those that are too many")
            assert infer(rig.channel)
        finally:
            for each in others:
                each.close()
