"""HTTP over TLS with a token, as Triton's client uses it, against ``onnx-dl serve``."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tritonclient.http")
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests.server.http_models import repository, x_of
from tests.server.raw_http import Reader, request
from tests.support.serving import Serving, serving
from tests.support.waiting import DEADLINE, allowed


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Serving, Callable[[], Any]]]:
    """A server with TLS and a token, and what makes clients of it."""
    trustme = pytest.importorskip("trustme")
    folder = tmp_path_factory.mktemp("secured")
    root = repository(folder / "repository")
    authority = trustme.CA()
    made = authority.issue_cert("127.0.0.1", "localhost")
    made.private_key_pem.write_to_path(str(folder / "key.pem"))
    with (folder / "cert.pem").open("wb") as out:
        for part in made.cert_chain_pems:
            out.write(part.bytes())
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    (folder / "tokens").write_text(
        f"tester:{hashlib.sha256(b'a-secret-of-the-test').hexdigest()}:infer,control\n"
    )
    (folder / "tokens").chmod(0o600)

    def client() -> Any:
        return triton.InferenceServerClient(
            address, ssl=True, ssl_options={"ca_certs": str(folder / "ca.pem")}, insecure=False
        )

    with serving(
        "--repository", root, "--tls-cert", folder / "cert.pem", "--tls-key", folder / "key.pem",
        "--token-file", folder / "tokens",
    ) as server:  # fmt: skip
        address = server.http
        with client() as made:
            # The client's first call opens descriptors of gevent, which stay.
            assert made.is_server_ready()
        yield server, client


def test_over_tls_with_a_token(secured: tuple[Serving, Callable[[], Any]]) -> None:
    _, client = secured
    headers = {"Authorization": "Bearer a-secret-of-the-test"}
    x = np.random.default_rng(5).standard_normal(2_000_000).astype(np.float32)
    with client() as made:
        assert made.is_server_ready()
        for array in (x[:5], x):
            assert np.array_equal(
                made.infer("identity", x_of(array), headers=dict(headers)).as_numpy("y"), array
            )
        with pytest.raises(InferenceServerException, match="token"):
            made.infer("identity", x_of(x[:5]))
        with pytest.raises(InferenceServerException) as caught:
            made.infer("identity", x_of(x), headers={"Authorization": "Bearer another"})
        assert caught.value.status() == "401"


def test_plain_text_at_the_port_of_tls_is_closed(secured: tuple[Serving, Callable[[], Any]]) -> None:
    server, client = secured
    host, _, port = server.http.partition(":")
    with socket.create_connection((host, int(port)), timeout=allowed(DEADLINE)) as connection:
        connection.sendall(request())
        assert Reader(connection).is_at_end()
    with client() as made:
        assert made.is_server_ready()
