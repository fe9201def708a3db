"""Check of the rights of each request: who may do what.

============  ==========================  =====================================================
options       who may                     ``Host`` and ``Origin``
============  ==========================  =====================================================
none          whoever reaches loopback    both: a page of another site must not use the server
--insecure    everyone                    ``Origin``: the names of the server are not known
--tls-ca      who shows a certificate     ``Origin``: browsers show certificates on their own
--token-file  who has a token; with       neither: no browser adds a token to a page's request
              --tls-ca a certificate, too
============  ==========================  =====================================================

A certificate alone gives all scopes.  Health needs nothing, except the certificate where TLS asks for one.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Final

from onnx_dl.server.auth import addresses, start, tokens
from onnx_dl.server.auth.addresses import Address
from onnx_dl.server.auth.followed import FileError, Followed
from onnx_dl.server.auth.refusals import Refusals
from onnx_dl.server.auth.tokens import Token
from onnx_dl.server.interfaces import Caller
from onnx_dl.server.options import ServeOptions
from onnx_dl.server.v2 import failures
from onnx_dl.server.v2.failures import RequestFailure
from onnx_dl.server.v2.operations import Operation, Scope

_UNKNOWN: Final = "This needs a token that the server knows, as Authorization: Bearer TOKEN."
_MOST_PASSED: Final = 64
_NO_CERTIFICATE: Final = "This needs a certificate that the server trusts."


class AccessError(ValueError):
    """Options with which a server must not start, or a file of theirs that is not valid."""


def open_access(options: ServeOptions, tell: Callable[[str], None] | None = None) -> RequestAccess:
    """The checks that these options ask for.  ``tell``: prints one line; None: on stderr.

    Raises:
        AccessError: the server must not start.
    """
    if (sentence := start.refusal(options)) is not None:
        raise AccessError(sentence)
    tell = tell or tell_on_stderr
    try:
        known = (
            Followed((options.token_file,), functools.partial(tokens.read, options.token_file), tell)
            if options.token_file
            else None
        )
    except FileError as error:
        raise AccessError(str(error)) from None
    return RequestAccess(options, known, tell)


class RequestAccess:
    """An ``Access`` (``server/interfaces.py``).  Thread-safe."""

    def __init__(
        self, options: ServeOptions, known: Followed[tuple[Token, ...]] | None, tell: Callable[[str], None]
    ) -> None:
        """``known``: the tokens; None: none is needed."""
        self._known = known
        self._needs_certificate = bool(options.tls_ca)
        self._refusals = Refusals(tell)
        self._checks_origin = known is None
        self._checks_host = known is None and not options.insecure and not options.tls_ca
        self._names = _own_names(options)
        self._is_open = known is None and not options.tls_ca
        self._passed: set[tuple[str | None, str | None]] = set()
        """Values of ``Host`` and ``Origin`` that may pass: few are sent again and again."""

    def check(self, operation: Operation, caller: Caller) -> None:
        """Raises RequestFailure: 401 without a known token, 403 if it lacks the scope."""
        if self._is_open:
            return
        scope = operation.scope
        if scope is Scope.HEALTH:
            return
        if self._needs_certificate and caller.certificate is None:
            # The handshake has asked for it: a second lock, should a listener have forgotten the first.
            raise self._refused(caller, failures.unauthenticated(_NO_CERTIFICATE), "no certificate")
        if self._known is None:
            return
        presented = tokens.bearer(caller.authorization)
        token = None if presented is None else tokens.find(self._known.current(), presented)
        if token is None:
            what = "no token" if presented is None else "an unknown token"
            raise self._refused(caller, failures.unauthenticated(_UNKNOWN), what)
        if scope not in token.scopes:
            failure = failures.forbidden(f"The token has no right to this: it lacks the scope {scope}.")
            raise self._refused(caller, failure, f"token {token.name!r} without the scope {scope}")

    def check_browser(self, host: str | None, origin: str | None) -> None:
        """Raises RequestFailure: 421 for a ``Host`` that is not ours, 403 for an ``Origin`` of another site.

        A page can be served under a name that its owner then points to 127.0.0.1.  The browser takes that for
        the same site, but still sends the name.  Addresses cannot be pointed elsewhere.  Programs that are no
        browsers send no ``Origin``, and may leave ``Host`` out.
        """
        if (host, origin) in self._passed:
            return
        address = None if host is None else addresses.parsed(host)
        if self._checks_host and host is not None and not self._is_ours(address):
            raise RequestFailure(
                421,
                "PERMISSION_DENIED",
                "This server does not know the name in Host. Use its address, or start it with --token-file.",
            )
        if (
            self._checks_origin
            and origin is not None
            and not (address and addresses.is_same(address, origin))
        ):
            raise failures.forbidden("Pages of other sites may not use this server.")
        if len(self._passed) < _MOST_PASSED:
            self._passed.add((host, origin))

    def _is_ours(self, address: Address | None) -> bool:
        if address is None:
            return False
        host = address.host
        return host in self._names or host.endswith(".localhost") or addresses.ip_address(host) is not None

    def _refused(self, caller: Caller, failure: RequestFailure, what: str) -> RequestFailure:
        self._refusals.note(caller.peer, what)
        return failure


def _own_names(options: ServeOptions) -> frozenset[str]:
    """Names by which browsers may ask for the server."""
    served = (addresses.parsed(text) for text in (options.http, options.metrics) if text)
    named = {address.host for address in served if address is not None and address.host}
    return frozenset({"localhost", os.uname().nodename.lower(), *named})


def tell_on_stderr(text: str) -> None:
    print(f"onnx-dl: {text}", file=sys.stderr, flush=True)
