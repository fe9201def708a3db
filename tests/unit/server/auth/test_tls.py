"""Certificates of the listeners, in memory."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from onnx_dl.server.auth import followed, tls
from onnx_dl.server.auth.access import AccessError
from onnx_dl.server.options import ServeOptions

trustme = pytest.importorskip("trustme")


class Files:
    """An authority, a certificate of it, and their files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = trustme.CA()
        self.issue("localhost")
        self.authority.cert_pem.write_to_path(str(folder / "ca.pem"))

    def issue(self, name: str) -> None:
        issued = self.authority.issue_cert(name)
        for file, blob in (("cert.pem", issued.cert_chain_pems[0]), ("key.pem", issued.private_key_pem)):
            fresh = self.folder / f"{file}.new"
            blob.write_to_path(str(fresh))
            os.replace(fresh, self.folder / file)

    def options(self, *, mutual: bool = False) -> ServeOptions:
        return ServeOptions(
            tls_cert=str(self.folder / "cert.pem"),
            tls_key=str(self.folder / "key.pem"),
            tls_ca=str(self.folder / "ca.pem") if mutual else "",
        )

    def client(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        return context


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


class Channel:
    """The server's side and the client's of one handshake, in memory.  Raises what the client sees."""

    def __init__(
        self,
        server: ssl.SSLContext,
        client: ssl.SSLContext,
        name: str | None = "localhost",
        session: ssl.SSLSession | None = None,
    ) -> None:
        to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.near = client.wrap_bio(to_client, to_server, server_hostname=name, session=session)
        self.far = server.wrap_bio(to_server, to_client, server_side=True)
        refused: ssl.SSLError | None = None
        steps: list[Callable[[], object]] = [
            self.near.do_handshake,
            self.far.do_handshake,
            lambda: self.far.write(b"x"),
        ]
        while steps and refused is None:
            for step in list(steps):
                if step == steps[-1] and len(steps) > 1:  # the last is for when both are done
                    break
                try:
                    step()
                except ssl.SSLWantReadError:
                    continue
                except ssl.SSLError as error:
                    if step == self.near.do_handshake:
                        raise
                    refused = error
                    break
                steps.remove(step)
        if refused is not None and self.near.do_handshake in steps:
            self.near.do_handshake()
        if self.near.read(1) != b"x":
            raise ConnectionResetError("the server closed the connection")


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str | None = "localhost") -> str | None:
    """One handshake: the protocol that was agreed on.  Raises what the client sees."""
    return Channel(server, client, name).near.selected_alpn_protocol()


def test_without_files_there_is_no_tls() -> None:
    assert tls.server_context(ServeOptions()) is None
    assert tls.grpc_credentials(ServeOptions()) is None


def test_a_handshake(files: Files) -> None:
    server = tls.server_context(files.options())
    assert server is not None
    client = files.client()
    client.set_alpn_protocols(["h2", "http/1.1"])
    assert handshake(server, client) == "http/1.1"


def test_old_versions_are_refused(files: Files) -> None:
    server = tls.server_context(files.options())
    assert server is not None and server.minimum_version >= ssl.TLSVersion.TLSv1_2


def test_clients_must_show_a_certificate_of_the_authority(files: Files) -> None:
    server = tls.server_context(files.options(mutual=True))
    assert server is not None
    with pytest.raises(OSError):
        handshake(server, files.client())
    stranger = files.client()
    trustme.CA().issue_cert("ann@example.org").configure_cert(stranger)
    with pytest.raises(OSError):
        handshake(server, stranger)
    known = files.client()
    files.authority.issue_cert("ann@example.org").configure_cert(known)
    handshake(server, known)


def test_new_files_are_used_by_new_connections(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followed, "LOOK_EVERY", 0.0)
    told: list[str] = []
    server = tls.server_context(files.options(), told.append)
    assert server is not None
    handshake(server, files.client())
    files.issue("second.example.org")
    handshake(server, files.client(), "second.example.org")
    (files.folder / "key.pem").write_text("nonsense")
    handshake(server, files.client(), "second.example.org")
    assert len(told) == 1 and str(files.folder / "key.pem") in told[0]


def test_an_authority_that_was_taken_away_is_trusted_no_longer(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a client that names no server, so that the handshake has no SNI."""
    monkeypatch.setattr(followed, "LOOK_EVERY", 0.0)
    server = tls.server_context(files.options(mutual=True))
    assert server is not None
    known = files.client()
    known.check_hostname = False
    files.authority.issue_cert("ann@example.org").configure_cert(known)
    handshake(server, known, None)
    trustme.CA().cert_pem.write_to_path(str(files.folder / "ca.pem"))
    with pytest.raises(OSError):
        handshake(server, known, None)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_does_not_outlive_the_authority_of_its_client(
    files: Files, monkeypatch: pytest.MonkeyPatch, version: ssl.TLSVersion
) -> None:
    monkeypatch.setattr(followed, "LOOK_EVERY", 0.0)
    server = tls.server_context(files.options(mutual=True))
    assert server is not None
    known = files.client()
    known.maximum_version = version
    files.authority.issue_cert("ann@example.org").configure_cert(known)
    session = Channel(server, known).near.session
    again = Channel(server, known, session=session)
    assert again.far.getpeercert(), "a certificate in each connection"
    trustme.CA().cert_pem.write_to_path(str(files.folder / "ca.pem"))
    with pytest.raises(OSError):
        Channel(server, known, session=session)


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("cert.pem", None, "cert.pem: No such file"),
        ("key.pem", None, "key.pem: No such file"),
        ("ca.pem", None, "ca.pem: No such file"),
        ("cert.pem", b"nonsense", "cert.pem: there is no certificate"),
        ("key.pem", b"nonsense", "key.pem: there is no private key"),
        ("ca.pem", b"nonsense", "ca.pem: there is no certificate"),
        ("ca.pem", b"", "ca.pem: there is no certificate"),
        ("key.pem", b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n", "key.pem: the key is encrypted"),
        ("key.pem", trustme.CA().private_key_pem.bytes(), "key.pem: this is not the key"),
    ],
)
def test_a_file_that_is_not_valid_is_named(
    files: Files, file: str, content: bytes | None, problem: str
) -> None:
    if content is None:
        (files.folder / file).unlink()
    else:
        (files.folder / file).write_bytes(content)
    for make in (tls.server_context, tls.grpc_credentials):
        with pytest.raises(AccessError) as caught:
            make(files.options(mutual=True))
        assert problem in str(caught.value)
