"""The head of a request: what httptools makes of its bytes, and what of it is refused.  Pure."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Final, Literal, NamedTuple

import httptools

from onnx_dl.server.http.limits import HEAD_BYTES, HEADERS, SKIPPED
from onnx_dl.server.v2.failures import RequestFailure, invalid, too_large

Encoding = Literal["", "gzip", "deflate"]
END: Final = b"\r\n\r\n"
_ONCE: Final = {
    b"host", b"origin", b"authorization", b"content-length", b"content-encoding", b"transfer-encoding",
    b"expect", b"inference-header-content-length", b"x-request-timeout-ms",
}  # fmt: skip
"""Headers that decide something here: two of them would be two answers."""
_MOST_DIGITS: Final = 18


@dataclasses.dataclass(slots=True)
class Head:
    """``target`` as it was sent.  ``headers`` by name in lower case; of several of one name the values are
    joined by commas."""

    method: str
    target: bytes
    version: str
    headers: dict[bytes, bytes]

    @property
    def keeps_alive(self) -> bool:
        """True if the client wants to send more requests on the connection."""
        wishes = self.headers.get(b"connection")
        if wishes is None:
            return self.version == "1.1"
        tokens = {token.strip() for token in wishes.lower().split(b",")}
        return b"close" not in tokens and (self.version == "1.1" or b"keep-alive" in tokens)

    def text(self, name: bytes) -> str | None:
        """A header's value; None: it was not sent."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")


class Framing(NamedTuple):
    """Form in which the body comes.  ``length`` in bytes; None: in chunks."""

    length: int | None
    encoding: Encoding
    header_length: int | None
    """Bytes of JSON at the begin of the body (uncompressed); None: all is JSON."""
    expects_continue: bool


class _Parts:
    """Receiver of what httptools finds."""

    __slots__ = ("headers", "is_complete", "messages", "names", "repeated", "target")

    def __init__(self) -> None:
        self.target = b""
        self.headers: dict[bytes, bytes] = {}
        self.names = 0
        self.messages = 0
        self.repeated = b""
        self.is_complete = False

    def on_message_begin(self) -> None:
        self.messages += 1

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.names += 1
        name = name.lower()
        if name in self.headers:
            if name in _ONCE:
                self.repeated = name
            value = self.headers[name] + b", " + value
        self.headers[name] = value

    def on_headers_complete(self) -> None:
        self.is_complete = True


def parse_head(data: bytes | bytearray | memoryview) -> Head:
    """Parse a head, from the request line to the empty line.

    Raises:
        RequestFailure: 400: it is not a head of HTTP/1; 431: it has too many headers; 505: another version.
    """
    parts = _Parts()
    parser = httptools.HttpRequestParser(parts)
    try:
        # An upgrade is not made: the request is answered in HTTP/1.
        with contextlib.suppress(httptools.HttpParserUpgrade):
            parser.feed_data(data)
        method, version = parser.get_method().decode("ascii"), parser.get_http_version()
    except (httptools.HttpParserError, UnicodeDecodeError) as error:
        raise invalid(f"The request's head is not valid: {error}") from None
    if version not in ("1.1", "1.0"):
        raise RequestFailure(505, "UNIMPLEMENTED", "Only HTTP/1.1 and HTTP/1.0 are spoken here.")
    if parts.names > HEADERS:
        raise RequestFailure(431, "RESOURCE_EXHAUSTED", f"The request has more than {HEADERS} headers.")
    if not parts.is_complete or parts.messages != 1 or not parts.target:
        raise invalid("The request's head is not valid.")
    if parts.repeated:
        raise invalid(f"The header {parts.repeated.decode('latin-1')} was sent twice.")
    if version == "1.1" and b"host" not in parts.headers:
        raise invalid("The request has no header Host.")
    return Head(method, parts.target, version, parts.headers)


def head_too_large() -> RequestFailure:
    return RequestFailure(
        431, "RESOURCE_EXHAUSTED", f"The request's head is larger than {HEAD_BYTES >> 10} KiB."
    )


def framing(head: Head, most: int, most_json: int) -> Framing:
    """Find how the body of a request comes.  ``most``: bytes of the body; ``most_json``: of JSON in it.

    Raises:
        RequestFailure: 400, 413, 415, 417 or 501.
    """
    headers, version = head.headers, head.version
    length_text = headers.get(b"content-length")
    length: int | None = None if length_text is None else _number("Content-Length", length_text)
    if (coding := headers.get(b"transfer-encoding")) is not None:
        if length is not None or version == "1.0":
            raise invalid("A request has either Content-Length or, in HTTP/1.1, Transfer-Encoding.")
        if coding.strip().lower() != b"chunked":
            raise RequestFailure(501, "UNIMPLEMENTED", "The only Transfer-Encoding here is chunked.")
    elif length is None:
        length = 0
    encoding = _encoding(headers.get(b"content-encoding"))
    header_length = None
    if (text := headers.get(b"inference-header-content-length")) is not None:
        header_length = _number("Inference-Header-Content-Length", text)
        if length is not None and not encoding and header_length > length:
            raise invalid(f"Inference-Header-Content-Length is {header_length}, the body has {length} bytes.")
    if length is not None and length > most:
        raise body_too_large(most)
    json = header_length if header_length is not None or encoding else length
    if json is not None and json > most_json:
        raise json_too_large(most_json)
    expects = headers.get(b"expect")
    if expects is not None and expects.strip().lower() != b"100-continue":
        raise RequestFailure(417, "INVALID_ARGUMENT", "The only Expect here is 100-continue.")
    return Framing(length, encoding, header_length, expects is not None and version == "1.1")


def skipped_length(head: Head | None) -> int | None:
    """Bytes of a refused request's body that are read and dropped, so that the connection can be kept.

    None: they are too many, or their number is not known.
    """
    if head is None:
        return None
    try:
        sent = framing(head, SKIPPED, SKIPPED)
    except RequestFailure:
        return None
    # Whoever waits for "100 Continue" may send the body, or the next request.
    return sent.length if not sent.expects_continue else None


def body_too_large(most: int) -> RequestFailure:
    return too_large(f"The body is larger than {most} bytes.")


def json_too_large(most: int) -> RequestFailure:
    return too_large(f"The JSON of the request is larger than {most} bytes.  Send tensors in binary form.")


def _number(name: str, text: bytes) -> int:
    if not text.isdigit() or len(text) > _MOST_DIGITS:
        raise invalid(f"{name} is not a number of bytes.")
    return int(text)


def _encoding(value: bytes | None) -> Encoding:
    match value.strip().lower() if value is not None else b"":
        case b"" | b"identity":
            return ""
        case b"gzip":
            return "gzip"
        case b"deflate":
            return "deflate"
    raise RequestFailure(415, "INVALID_ARGUMENT", "The only encodings of a body here are gzip and deflate.")
