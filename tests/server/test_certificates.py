"""TLS with a real server and real clients: certificates of both sides, and their change."""

from __future__ import annotations

import http.client
import os
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import onnx_dl
from tests.support.asking import asked, called, closing, grpc
from tests.support.serving import Serving, serving
from tests.support.waiting import DEADLINE, allowed, eventually

for needed in ("httptools", "starlette"):
    pytest.importorskip(needed, reason="needs the packages of the extra serve")
trustme = pytest.importorskip("trustme", reason="needs the packages of the extra dev")

MODEL = Path(onnx_dl.__file__).parent / "demo" / "assets" / "digits.onnx"


class Authority:
    """An authority with a certificate for the server and one for a client, as files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.own = trustme.CA()
        self.own.cert_pem.write_to_path(str(folder / "ca.pem"))
        self.issue_server()
        client = self.own.issue_cert("ann@example.org")
        client.private_key_and_cert_chain_pem.write_to_path(str(folder / "client.pem"))

    def issue_server(self) -> None:
        issued = self.own.issue_cert("127.0.0.1", "localhost")
        for name, blob in (("key.pem", issued.private_key_pem), ("cert.pem", issued.cert_chain_pems[0])):
            blob.write_to_path(str(self.folder / "new"))
            os.replace(self.folder / "new", self.folder / name)

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def client(self, certificate: str | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.path("ca.pem"))
        if certificate is not None:
            context.load_cert_chain(certificate)
        return context


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def mutual(authority: Authority) -> Iterator[Serving]:
    """A server that wants certificates, also for its metrics."""
    files = [f"--tls-{name}={authority.path(f'{name}.pem')}" for name in ("cert", "key", "ca")]
    with serving("--model", f"digits={MODEL}", "--metrics", "127.0.0.1:0", *files) as server:
        yield server


def test_a_certificate_lets_in_over_http(mutual: Serving, authority: Authority) -> None:
    known = authority.client(authority.path("client.pem"))
    for path in ("/v2/health/live", "/v2", "/metrics"):
        assert asked(mutual.http, "GET", path, tls=known)[0] == 200
    assert asked(mutual.metrics, "GET", "/metrics", tls=known)[0] == 200
    stranger = Path(authority.path("stranger.pem"))
    trustme.CA().issue_cert("eve@example.org").private_key_and_cert_chain_pem.write_to_path(str(stranger))
    for client in (authority.client(), authority.client(str(stranger))):
        for address in (mutual.http, mutual.metrics):
            with pytest.raises(OSError):
                asked(address, "GET", "/v2/health/live", tls=client)
    with pytest.raises((OSError, http.client.HTTPException)):
        asked(mutual.http, "GET", "/v2/health/live")


def test_a_certificate_lets_in_over_grpc(mutual: Serving, authority: Authority) -> None:
    pair = authority.read("client.pem"), authority.read("client.pem")
    known = grpc.ssl_channel_credentials(authority.read("ca.pem"), *pair)
    with grpc.secure_channel(mutual.grpc, known) as opened:
        assert called(opened, "ServerMetadata", None) is grpc.StatusCode.OK
    with grpc.secure_channel(mutual.grpc, grpc.ssl_channel_credentials(authority.read("ca.pem"))) as opened:
        assert called(opened, "ServerLive", None) is grpc.StatusCode.UNAVAILABLE
    with grpc.insecure_channel(mutual.grpc) as opened:
        assert called(opened, "ServerLive", None) is grpc.StatusCode.UNAVAILABLE


def test_clients_of_the_field_show_certificates(mutual: Serving, authority: Authority) -> None:
    tritonhttp = pytest.importorskip("tritonclient.http")
    tritongrpc = pytest.importorskip("tritonclient.grpc")
    options = {"ca_certs": authority.path("ca.pem"), "certfile": authority.path("client.pem")}
    client = tritonhttp.InferenceServerClient(
        mutual.http, ssl=True, ssl_options=options | {"keyfile": authority.path("client.pem")}
    )
    with closing(client):
        assert client.is_server_ready() and client.get_server_metadata()
    client = tritongrpc.InferenceServerClient(
        mutual.grpc, ssl=True, root_certificates=authority.path("ca.pem"),
        private_key=authority.path("client.pem"), certificate_chain=authority.path("client.pem"),
    )  # fmt: skip
    with closing(client):
        assert client.is_server_ready() and client.get_server_metadata()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_shows_a_certificate(mutual: Serving, authority: Authority) -> None:
    def curl(*arguments: str) -> int:
        command = ["curl", "-sf", "--max-time", "60", "--cacert", authority.path("ca.pem"), *arguments]
        return subprocess.run(
            [*command, f"{mutual.url}/v2"], capture_output=True, timeout=90, check=False
        ).returncode

    assert mutual.url.startswith("https://")
    assert curl("--cert", authority.path("client.pem")) == 0
    assert curl() != 0


def test_new_certificates_are_used_by_new_connections(mutual: Serving, authority: Authority) -> None:
    def shown(address: str) -> str:
        host, _, port = address.rpartition(":")
        return ssl.get_server_certificate((host, int(port)), timeout=allowed(DEADLINE))

    addresses = (mutual.http, mutual.grpc, mutual.metrics)
    before = {shown(address) for address in addresses}
    authority.issue_server()
    eventually(lambda: before.isdisjoint(map(shown, addresses)), "new certificates at all addresses")
    assert asked(mutual.http, "GET", "/v2", tls=authority.client(authority.path("client.pem")))[0] == 200
