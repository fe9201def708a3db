"""A parser of protobuf's text format, as config.pbtxt is written: text to a tree with line numbers.

Knows no message: what the names mean is :mod:`.schema`'s.  The text may have any content; the time is bounded
by its length, the depth by :data:`DEEPEST`.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple, TypeAlias

DEEPEST: Final = 24
"""Messages within each other; a configuration needs eight."""
LONGEST: Final = 1 << 20
"""Characters of a text."""


class Malformed(ValueError):
    """The text, or a value in it, cannot be used.  ``line`` counts from 1; 0: it has none."""

    def __init__(self, line: int, sentence: str) -> None:
        super().__init__(sentence)
        self.line = line


class Word(str):
    """A value without quotes: the name of an enum's value, true, false, inf, nan."""

    __slots__ = ()


Scalar: TypeAlias = str | int | float | Word
Value: TypeAlias = "Scalar | list[Node]"
"""A message is the list of its fields."""


class Node(NamedTuple):
    """One field.  A field that comes several times, or has a list, is several nodes of one name."""

    name: str
    value: Value
    line: int


class _Lexeme(NamedTuple):
    kind: str
    text: str
    line: int


_TOKEN: Final = re.compile(
    r"(?P<space>[ \t\r\f\v]+|\#[^\n]*)"
    r"|(?P<newline>\n)"
    r"|(?P<number>(?:0[xX][0-9a-fA-F]+|(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?[fF]?)(?![A-Za-z0-9_.]))"
    r"|(?P<word>[A-Za-z_][A-Za-z0-9_]*)"
    r"|(?P<text>\"(?:[^\"\\\n]|\\[^\n])*\"|'(?:[^'\\\n]|\\[^\n])*')"
    r"|(?P<mark>[{}<>\[\]:,;-])"
)
_ESCAPE: Final = re.compile(
    rb"\\(?:(?P<octal>[0-7]{1,3})|[xX](?P<hex>[0-9a-fA-F]{1,2})|u(?P<short>[0-9a-fA-F]{4})"
    rb"|U(?P<long>[0-9a-fA-F]{8})|(?P<plain>[abfnrtv\\'\"?])|(?P<wrong>.))",
    re.DOTALL,
)
_PLAIN: Final = {
    b"a": b"\a", b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v",
}  # fmt: skip
_CLOSING: Final = {"{": "}", "<": ">"}


def parse(text: str) -> list[Node]:
    """The fields of the whole text.  Raises Malformed, with the line."""
    if len(text) > LONGEST:
        raise Malformed(0, f"it has more than {LONGEST} characters")
    return _Parser(_tokens(text.removeprefix("\ufeff"))).message("", 0)


def _tokens(text: str) -> list[_Lexeme]:
    found = []
    line, at = 1, 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise Malformed(line, _complaint(text, at))
        kind = match.lastgroup or ""
        if kind == "newline":
            line += 1
        elif kind != "space":
            found.append(_Lexeme(kind, match.group(), line))
        at = match.end()
    found.append(_Lexeme("end", "", line))
    return found


def _complaint(text: str, at: int) -> str:
    if text[at] in "\"'":
        return "this text has no closing quote on its line"
    if text[at].isdigit() or text[at] == ".":
        return f"{text[at : at + 20].split()[0]!r} is not a number"
    return f"{text[at]!r} has no meaning here"


class _Parser:
    """One pass over the tokens."""

    def __init__(self, tokens: list[_Lexeme]) -> None:
        self._tokens = tokens
        self._at = 0

    def message(self, closing: str, depth: int) -> list[Node]:
        """Fields up to the closing mark, which is consumed; empty: up to the end of the text."""
        if depth > DEEPEST:
            raise Malformed(self._next.line, f"messages are nested more than {DEEPEST} levels deep")
        opened = self._tokens[self._at - 1].line
        fields: list[Node] = []
        while True:
            token = self._take()
            if token.kind == "end":
                if closing:
                    raise Malformed(token.line, f"{closing!r} is missing for the message of line {opened}")
                return fields
            if closing and token.text == closing and token.kind == "mark":
                return fields
            if token.kind != "word":
                what = "extensions are not known" if token.text == "[" else "a field's name was expected"
                raise Malformed(token.line, f"{what}, not {_shown(token)}")
            self._field(token, depth, fields)
            if self._next.kind == "mark" and self._next.text in ",;":
                self._at += 1

    def _field(self, name: _Lexeme, depth: int, fields: list[Node]) -> None:
        has_colon = self._accept(":")
        if self._accept("["):
            if not has_colon and not self._opens():
                raise Malformed(name.line, f"':' is missing after {name.text}")
            while not self._accept("]"):
                line = self._next.line
                fields.append(Node(name.text, self._value(depth), line))
                if not self._accept(",") and self._next.text != "]":
                    raise Malformed(self._next.line, f"',' or ']' was expected, not {_shown(self._next)}")
        elif has_colon or self._opens():
            fields.append(Node(name.text, self._value(depth), name.line))
        else:
            raise Malformed(name.line, f"':' or '{{' was expected after {name.text}")

    def _value(self, depth: int) -> Value:
        token = self._take()
        if token.kind == "mark" and token.text in _CLOSING:
            return self.message(_CLOSING[token.text], depth + 1)
        if token.kind == "text":
            parts = [_unquoted(token)]
            while self._next.kind == "text":
                parts.append(_unquoted(self._take()))
            try:
                return b"".join(parts).decode()
            except UnicodeDecodeError:
                raise Malformed(token.line, "this text is not UTF-8") from None
        if token.kind == "number":
            return _number(token, 1)
        if token.kind == "mark" and token.text == "-":
            follows = self._take()
            if follows.kind == "number":
                return _number(follows, -1)
            if follows.kind == "word" and follows.text.lower() in ("inf", "infinity", "nan"):
                return Word(f"-{follows.text}")
            raise Malformed(follows.line, f"a number was expected after '-', not {_shown(follows)}")
        if token.kind == "word":
            return Word(token.text)
        raise Malformed(token.line, f"a value was expected, not {_shown(token)}")

    def _opens(self) -> bool:
        return self._next.kind == "mark" and self._next.text in _CLOSING

    @property
    def _next(self) -> _Lexeme:
        return self._tokens[self._at]

    def _take(self) -> _Lexeme:
        token = self._tokens[self._at]
        if token.kind != "end":
            self._at += 1
        return token

    def _accept(self, mark: str) -> bool:
        if self._next.kind == "mark" and self._next.text == mark:
            self._at += 1
            return True
        return False


def _number(token: _Lexeme, sign: int) -> int | float:
    text = token.text
    try:
        if text[:2] in ("0x", "0X"):
            return sign * int(text, 16)
        if text.isdigit():
            if len(text) > 40:
                raise Malformed(token.line, f"{text[:20]}... is not a number of 64 bits")
            return sign * int(text, 8 if text[0] == "0" and len(text) > 1 else 10)
        return sign * float(text.rstrip("fF"))
    except ValueError as error:
        if isinstance(error, Malformed):
            raise
        raise Malformed(token.line, f"{text[:40]!r} is not a number") from None


def _unquoted(token: _Lexeme) -> bytes:
    def plain(match: re.Match[bytes]) -> bytes:
        kind, value = match.lastgroup, match[match.lastgroup or 0]
        if kind == "plain":
            return _PLAIN.get(value, value)
        if kind == "wrong":
            raise Malformed(token.line, f"\\{value.decode(errors='replace')} is not an escape")
        code = int(value, 8 if kind == "octal" else 16)
        if kind in ("octal", "hex"):
            return bytes([code & 255])
        try:
            return chr(code).encode()
        except (ValueError, UnicodeEncodeError, OverflowError):
            raise Malformed(token.line, f"\\{value.decode()} is not a character") from None

    data = token.text[1:-1].encode(errors="surrogatepass")
    return _ESCAPE.sub(plain, data) if b"\\" in data else data


def _shown(token: _Lexeme) -> str:
    return "the end of the text" if token.kind == "end" else repr(token.text[:40])
