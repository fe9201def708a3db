"""The file of tokens, and the comparison."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_dl.server.auth import tokens
from onnx_dl.server.auth.followed import FileError
from onnx_dl.server.v2.operations import Scope


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_lines_comments_and_blank_lines() -> None:
    text = (
        f"# who: {digest('x')}\n\n  ann:{digest('a')}:infer,shm \nbob : {digest('b').upper()} : control\r\n"
    )
    ann, bob = tokens.parse(text, "file")
    assert (ann.name, ann.scopes) == ("ann", {Scope.INFER, Scope.SHM})
    assert (bob.name, bob.scopes, bob.digest.hex()) == ("bob", {Scope.CONTROL}, digest("b"))
    assert tokens.parse("", "file") == ()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("ann", "name:sha256:scopes"),
        (f"ann:{digest('a')}", "name:sha256:scopes"),
        (f"ann:{digest('a')}:infer:shm", "name:sha256:scopes"),
        (f":{digest('a')}:infer", "no name"),
        (f"a nn:{digest('a')}:infer", "no name"),
        (f"ann:{digest('a')[1:]}:infer", "64 hexadecimal"),
        (f"ann:{digest('a')}:", "no scope"),
        (f"ann:{digest('a')}:infer,", "no scope"),
        (f"ann:{digest('a')}:all", "'all' is no scope"),
        (f"ann:{digest('a')}:health", "'health' is no scope"),
        (f"first:{digest('b')}:infer", "twice"),
        (f"ann:{digest('first')}:infer", "same token"),
    ],
)
def test_an_invalid_line_is_named(line: str, problem: str) -> None:
    with pytest.raises(FileError) as caught:
        tokens.parse(f"# comment\nfirst:{digest('first')}:infer\n{line}\n", "a/file")
    assert str(caught.value).startswith("a/file:3: ") and problem in str(caught.value)


def test_a_token_in_place_of_its_digest_is_not_shown() -> None:
    with pytest.raises(FileError) as caught:
        tokens.parse("ann:hunter2:infer", "file")
    assert "hunter2" not in str(caught.value)


@given(st.text())
def test_any_text_is_tokens_or_a_file_error(text: str) -> None:
    try:
        tokens.parse(text, "file")
    except FileError as error:
        assert str(error).startswith("file:")


def test_a_token_is_found_by_its_text_only() -> None:
    known = tokens.parse(f"ann:{digest('a')}:infer\nbob:{digest('b')}:infer", "file")
    found = {
        text: tokens.find(known, text) for text in ("a", "b", "c", "", "A", "ann", digest("a"), "\udcff")
    }
    assert [text for text, token in found.items() if token] == ["a", "b"]
    assert found["b"] is not None and found["b"].name == "bob"
    assert tokens.find((), "a") is None


def test_every_line_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    known = tokens.parse("\n".join(f"t{n}:{digest(str(n))}:infer" for n in range(5)), "file")
    compared: list[bytes] = []

    def compare(one: bytes, two: bytes) -> bool:
        compared.append(one)
        return one == two

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert tokens.find(known, "0") is known[0]
    assert compared == [token.digest for token in known]


@pytest.mark.parametrize(
    ("value", "token"),
    [("Bearer x", "x"), ("bearer  x ", "x"), ("BEARER x y", "x y"), ("Bearer", None), ("Bearer ", None),
     ("Basic x", None), ("x", None), ("", None), (None, None), ("Bearerx", None)],
)  # fmt: skip
def test_the_header_authorization(value: str | None, token: str | None) -> None:
    assert tokens.bearer(value) == token


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"ann:{digest('a')}:infer\n")
    return path


def test_a_file_is_read_also_if_all_may_read_it(file: Path) -> None:
    for mode in (0o600, 0o640, 0o644):
        file.chmod(mode)
        assert [token.name for token in tokens.read(str(file))] == ["ann"]


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_refused(file: Path, mode: int) -> None:
    file.chmod(mode)
    with pytest.raises(FileError, match="others may write it"):
        tokens.read(str(file))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_of_another_user_is_refused(file: Path) -> None:
    os.chown(file, 12345, -1)
    with pytest.raises(FileError, match="others may write it"):
        tokens.read(str(file))


def test_what_is_no_file_of_tokens(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "large").write_bytes(b"#" * ((1 << 20) + 1))
    problems = {"missing": "No such file", "fifo": "no file", "folder": "no file"}
    for name, problem in {**problems, "binary": "UTF-8", "large": "more than"}.items():
        with pytest.raises(FileError, match=problem) as caught:
            tokens.read(str(tmp_path / name))
        assert str(caught.value).startswith(str(tmp_path / name))
