"""Certificates of the listeners, for HTTP and for gRPC, read again when their files change.

Both protocols use the same files: a chain and its key, and optionally the authorities whose certificates
clients must show.  TLS 1.2 or newer.
"""

from __future__ import annotations

import functools
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from onnx_dl.server.auth.access import AccessError, tell_on_stderr
from onnx_dl.server.auth.followed import FileError, Followed
from onnx_dl.server.options import ServeOptions
from onnx_dl.system import small_files

if TYPE_CHECKING:
    import grpc

_MOST_BYTES: Final = 1 << 22


class Certificates(NamedTuple):
    """Contents of the files, in PEM, and a context made of them.  ``authorities`` None: clients show none."""

    chain: bytes
    key: bytes
    authorities: bytes | None
    context: ssl.SSLContext


def server_context(options: ServeOptions, tell: Callable[[str], None] | None = None) -> ssl.SSLContext | None:
    """Context of the HTTP listeners; None: they speak no TLS.

    Each new connection gets the files' newest valid certificates.

    Raises:
        AccessError: a file is not valid.
    """
    if not options.tls_cert:
        return None
    context = _NewestContext(ssl.PROTOCOL_TLS_SERVER)
    context.followed = _followed(options, tell)
    context.followed.current()
    return context


class _NewestContext(ssl.SSLContext):
    """Context in whose place each connection gets that of the newest files, from its first byte on.

    To replace a connection's context in its handshake would be too late: a session that a client resumes has
    been found by then, and its certificate is not looked at again.
    """

    followed: Followed[Certificates]

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        newest = self.followed.current().context
        return newest.wrap_bio(incoming, outgoing, server_side, server_hostname, session)


def grpc_credentials(
    options: ServeOptions, tell: Callable[[str], None] | None = None
) -> grpc.ServerCredentials | None:
    """Credentials of the gRPC listeners; None: they speak no TLS.  As :func:`server_context`."""
    if not options.tls_cert:
        return None
    import grpc

    followed = _followed(options, tell)
    given = followed.current()

    def configuration(found: Certificates) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(found.key, found.chain)], found.authorities)

    def newest() -> grpc.ServerCertificateConfiguration | None:
        nonlocal given
        current = followed.current()
        if current is given:  # handshakes may overlap: a new configuration twice does no harm
            return None
        given = current
        return configuration(current)

    return grpc.dynamic_ssl_server_credentials(
        configuration(given), newest, require_client_authentication=given.authorities is not None
    )


def _followed(options: ServeOptions, tell: Callable[[str], None] | None) -> Followed[Certificates]:
    paths = tuple(path for path in (options.tls_cert, options.tls_key, options.tls_ca) if path)
    try:
        return Followed(paths, functools.partial(_read, options), tell or tell_on_stderr)
    except FileError as error:
        raise AccessError(str(error)) from None


def _read(options: ServeOptions) -> Certificates:
    """Reads and checks the files.  Raises FileError.

    What the context reads and what is returned may differ if a file changes in between; then Followed sees
    that the files changed, and reads them again.
    """
    chain, key = _pem(options.tls_cert), _pem(options.tls_key)
    authorities = _pem(options.tls_ca) if options.tls_ca else None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if b"ENCRYPTED" in key:
        raise FileError(f"{options.tls_key}: the key is encrypted. Give one that is not.")
    try:
        context.load_cert_chain(options.tls_cert, options.tls_key, password=_no_password)
    except ssl.SSLError as error:
        raise FileError(_pair_problem(options, error)) from None
    except OSError as error:
        raise FileError(f"{options.tls_cert}: {error.strerror}.") from None
    if options.tls_ca:
        _trust(context, options.tls_ca)
        # Each connection shows its certificate.  Without tickets only TLS 1.2 resumes sessions, by their
        # numbers, and those of a context end with it: when the files change.
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
    return Certificates(chain, key, authorities, context)


def _pem(path: str) -> bytes:
    try:
        return small_files.read(path, _MOST_BYTES)
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}.") from None


def _no_password() -> bytes:
    """No password, in place of a question on the terminal."""
    return b""


def _pair_problem(options: ServeOptions, error: ssl.SSLError) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return f"{options.tls_key}: this is not the key of the certificate in {options.tls_cert}."
    try:
        ssl.create_default_context(cafile=options.tls_cert)
    except (ssl.SSLError, OSError):
        return f"{options.tls_cert}: there is no certificate in PEM in it."
    return f"{options.tls_key}: there is no private key in PEM in it."


def _trust(context: ssl.SSLContext, path: str) -> None:
    try:
        context.load_verify_locations(cafile=path)
    except (ssl.SSLError, OSError):
        raise FileError(f"{path}: there is no certificate in PEM in it.") from None
    context.verify_mode = ssl.CERT_REQUIRED
