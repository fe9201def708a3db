"""Options of ``onnx-dl serve``: of the command line, of ``host.toml``, and their defaults."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from onnx_dl.cli import grammar, serve_words
from onnx_dl.cli.serve import check_installed, options_of
from onnx_dl.demo.assets import model_path
from onnx_dl.errors import ConfigError, PlatformError
from onnx_dl.server.options import ServeOptions
from onnx_dl.supervisor.hostfile import schema

DIGITS = str(model_path("digits"))
FIELDS = set(ServeOptions.__struct_fields__)


def given(*words: str) -> dict[str, Any]:
    """The options of a command line that were given."""
    found = vars(grammar.parser().parse_args(["serve", *words]))
    return {name: value for name, value in found.items() if value is not None}


def options(*words: str) -> ServeOptions:
    return options_of(given(*words))


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        options(*words)
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A host.toml with a model and many options."""
    path = tmp_path / "host.toml"
    path.write_text(
        f"""
[serve]
http = "127.0.0.1:9000"
grpc = "off"
repository = "models"
memory_limit = "3GB"
max_body = "2MB"
drain_timeout = "1m"
token_file = "tokens"
strict_readiness = true

[models.digits]
path = "{DIGITS}"
ttl = "10m"
eager = true
"""
    )
    (tmp_path / "models").mkdir()
    return path


def test_the_command_line_alone() -> None:
    found = options("--model", f"d={DIGITS}", "--http", "off", "--max-body", "1KB", "--poll-every", "500ms")
    assert found == ServeOptions(models={"d": DIGITS}, http="", max_body=1000, poll_every=0.5)


def test_the_file_alone(file: Path) -> None:
    found = options("--config", str(file))
    folder = str(file.parent)
    assert (found.http, found.grpc, found.max_body) == ("127.0.0.1:9000", "", 2_000_000)
    assert found.memory_limit == 3_000_000_000
    assert (found.drain_timeout, found.strict_readiness) == (60.0, True)
    assert (found.repository, found.token_file) == ((f"{folder}/models",), f"{folder}/tokens")
    (model,) = found.file_models
    assert (model.name, model.spec.path, model.terms.ttl, model.is_eager) == ("digits", DIGITS, 600.0, True)


def test_the_command_line_overrides_the_file(file: Path) -> None:
    found = options(
        "--config", str(file), "--http", "localhost:0", "--max-body", "5", "--grpc", "127.0.0.1:1"
    )
    assert (found.http, found.grpc, found.max_body) == ("localhost:0", "127.0.0.1:1", 5)
    assert found.drain_timeout == 60.0


def test_options_travel_to_other_processes(file: Path) -> None:
    found = options("--config", str(file))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(found), type=ServeOptions) == found


def test_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    found = options("--repository", "models", "--token-file", "tokens", "--tls-cert", "c", "--tls-key", "k")
    assert found.repository == (f"{tmp_path}/models",)
    assert [found.token_file, found.tls_cert, found.tls_key] == [
        f"{tmp_path}/{n}" for n in ("tokens", "c", "k")
    ]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "There is no model to serve"),
        (["--model", "digits"], "is not NAME=PATH"),
        (["--model", f"a/b={DIGITS}"], "is not NAME=PATH"),
        (["--model", f"={DIGITS}"], "is not NAME=PATH"),
        (["--model", "d=/nowhere.onnx"], "there is no file /nowhere.onnx"),
        (["--model", f"d={DIGITS}", "--model", f"d={DIGITS}"], "given twice"),
        (["--repository", "/nowhere"], "is not a folder"),
        (["--demo", "--http", "off", "--grpc", "off"], "there is nothing to serve"),
        (["--demo", "--http", "8000"], "is not an address"),
        (["--demo", "--http", "127.0.0.1:66000"], "is not an address"),
        (["--demo", "--max-body", "much"], "much"),
        (["--demo", "--drain-timeout", "soon"], "is not a time"),
        (["--demo", "--poll-every", "0"], "is not a time"),
        (["--demo", "--load-model", "digits"], "--model-control explicit"),
        (["--demo", "--tls-cert", "x"], "go together"),
        (["--demo", "--tls-ca", "x"], "needs --tls-cert"),
        (["--demo", "--config", "/nowhere.toml"], "cannot be read"),
    ],
)
def test_what_is_refused(words: list[str], reason: str) -> None:
    assert reason in refusal(*words)


@pytest.mark.parametrize("words", [["--processes", "0"], ["--processes", "65"], ["--max-queue-size", "-1"]])
def test_what_the_parser_refuses(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        given("--demo", *words)
    assert words[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('http = "8000"', 'serve.http = "8000" is not an address'),
        ("grpc = 8001", "serve.grpc = 8001 must be"),
        ("processes = 0", "serve.processes = 0 must be a number of processes from 1 to 64"),
        ('model_control = "all"', 'serve.model_control = "all" must be "none", "poll" or "explicit"'),
        ('client_shm = "on"', 'must be "off", "copy" or "map"'),
        ('max_body = "much"', 'serve.max_body = "much" is not'),
        ("poll_every = 0", "serve.poll_every = 0 must be a time greater than 0"),
        ("insecure = 1", "serve.insecure = 1 must be true or false"),
        ("pasword = 1", "serve.pasword is not a known key"),
        ("repository = 5", "serve.repository = 5 must be the path of a folder"),
    ],
)
def test_what_the_file_may_not_say(line: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "host.toml"
    file.write_text(f"memory_limit = '1GB'\n[serve]\n{line}\n")
    text = refusal("--demo", "--config", str(file))
    assert text.startswith(f"{file}, line 3: ") and reason in text


def test_every_option_is_a_key_of_the_file_and_a_field() -> None:
    words = {
        word.field or word.option[2:].replace("-", "_")
        for group in serve_words.GROUPS.values()
        for word in group
    }
    assert words == FIELDS - {"file_models"}
    # Models have a table each.
    assert set(schema.ServeTable.__struct_fields__) == words - {"models", "config", "demo"}


def test_the_defaults_in_the_help_are_those_of_the_fields() -> None:
    known = {"1GiB": 1 << 30, "none": "none", "off": "", "onnx-dl": "onnx-dl"}
    for word in (word for group in serve_words.GROUPS.values() for word in group):
        field = word.field or word.option[2:].replace("-", "_")
        if (told := re.search(r"\(default: ([\w.:-]+)\)$", word.help)) is None:
            continue
        default = next(each.default for each in msgspec.structs.fields(ServeOptions) if each.name == field)
        text = told[1]
        assert (
            default == (float(text) if text.isdecimal() else known.get(text, text)) or field == "client_shm"
        )


def test_a_missing_extra_is_told_with_the_command() -> None:
    with pytest.raises(PlatformError) as caught:
        check_installed(["httptools", "no_such_module", "nor.this"])
    assert 'pip install "onnx-dl[serve]"' in str(caught.value)
    assert "no_such_module and nor.this" in str(caught.value) and "httptools" not in str(caught.value)
