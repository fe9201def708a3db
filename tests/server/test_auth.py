"""Who may do what, with a real server and real clients: tokens, other sites, refused starts."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import queue
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.asking import INFERENCE, asked, called, closing, grpc, status
from tests.support.serving import Serving, serving
from tests.support.waiting import DEADLINE, allowed, eventually

for needed in ("httptools", "starlette"):
    pytest.importorskip(needed, reason="needs the packages of the extra serve")

import onnx_dl  # noqa: E402
from onnx_dl.server.grpc.service import CALLS  # noqa: E402
from onnx_dl.server.http.targets import ROUTES, find_target  # noqa: E402
from onnx_dl.server.v2.operations import Operation, Scope  # noqa: E402

ROOT = Path(__file__).parents[2]
MODEL = Path(onnx_dl.__file__).parent / "demo" / "assets" / "digits.onnx"
SCOPES = [scope for scope in Scope if scope is not Scope.HEALTH]
NAMES = {"model": "digits", "version": "1", "region": "r"}
OTHER = NAMES | {"model": "other"}  # what is unloaded is withdrawn
REQUESTS = [
    (method, route.template.format(**OTHER if "repository" in route.template else NAMES), operation)
    for route in ROUTES
    for method, operation in route.operations.items()
]
"""Every path and method of HTTP, and its operation."""
METHODS = {name: call.operation for name, call in CALLS.items()}
METHODS |= {"ModelInfer": Operation.INFER, "ModelStreamInfer": Operation.INFER}
"""Every method of gRPC, and its operation."""
REFUSED = (401, 403)
UNAUTHENTICATED, DENIED = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED


def token_of(name: str) -> str:
    return f"{name}-0123456789abcdef"


def token_lines(*scopes: str) -> str:
    """A line of the file for each scope: its token is ``token_of(scope)``."""
    return "".join(f"{s}:{hashlib.sha256(token_of(s).encode()).hexdigest()}:{s}\n" for s in scopes)


def replace(path: Path, text: str) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.rename(path)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.write_text(token_lines(*SCOPES))
    return path


@pytest.fixture(scope="module")
def guarded(file: Path) -> Iterator[Serving]:
    """A server with a token for each scope, on loopback."""
    arguments = ["--model", f"digits={MODEL}", "--model-control", "explicit", "--client-shm", "copy"]
    with serving(*arguments, "--metrics", "127.0.0.1:0", "--token-file", file) as server:
        yield server


@pytest.fixture(scope="module")
def channel(guarded: Serving) -> Iterator[Any]:
    with grpc.insecure_channel(guarded.grpc) as opened:
        grpc.channel_ready_future(opened).result(allowed(DEADLINE))
        yield opened


# --- tokens -----------------------------------------------------------------------------------------------


def test_every_operation_is_tried() -> None:
    assert {operation for *_, operation in REQUESTS} == set(Operation)
    assert set(METHODS.values()) == set(Operation) - {Operation.METRICS, Operation.MODEL_STATE}
    for method, path, operation in REQUESTS:
        found = find_target(path.encode())
        assert found is not None and found.route.operations[method] is operation


@pytest.mark.parametrize(("method", "path", "operation"), REQUESTS, ids=lambda value: str(value))
def test_http(guarded: Serving, method: str, path: str, operation: Operation) -> None:
    if operation.scope is Scope.HEALTH:
        assert status(guarded.http, method, path, None) not in REFUSED
        return
    refused, _, headers = asked(guarded.http, method, path)
    assert (refused, headers["www-authenticate"]) == (401, "Bearer")
    assert status(guarded.http, method, path, "wrong") == 401
    for scope in SCOPES:
        found = status(guarded.http, method, path, token_of(scope))
        assert found not in REFUSED if scope is operation.scope else found == 403


@pytest.mark.parametrize(("method", "operation"), METHODS.items(), ids=lambda value: str(value))
def test_grpc(channel: Any, method: str, operation: Operation) -> None:
    if operation.scope is Scope.HEALTH:
        assert called(channel, method, None) not in (UNAUTHENTICATED, DENIED)
        return
    assert called(channel, method, None) is UNAUTHENTICATED
    assert called(channel, method, "wrong") is UNAUTHENTICATED
    for scope in SCOPES:
        found = called(channel, method, token_of(scope))
        if scope is operation.scope:
            assert found not in (UNAUTHENTICATED, DENIED)
        else:
            assert found is DENIED


def test_the_port_of_the_metrics_has_the_same_rules(guarded: Serving) -> None:
    found = [status(guarded.metrics, "GET", "/metrics", token) for token in (None, token_of("infer"))]
    assert found == [401, 403]
    assert status(guarded.metrics, "GET", "/metrics", token_of("metrics")) == 200
    assert status(guarded.metrics, "GET", "/v2/models/digits", token_of("infer")) == 404


def test_a_body_is_not_read_for_who_may_not(guarded: Serving) -> None:
    """The answer comes before a byte of the 1 GB that the head announces."""
    with contextlib.closing(
        http.client.HTTPConnection(guarded.http, timeout=allowed(DEADLINE))
    ) as connection:
        connection.putrequest("POST", "/v2/models/digits/infer")
        connection.putheader("Content-Length", str(10**9))
        connection.endheaders()
        assert connection.getresponse().status == 401


def test_refusals_are_logged_without_the_token(guarded: Serving) -> None:
    status(guarded.http, "GET", "/v2", "hunter2-hunter2")
    eventually(lambda: "refused requests" in guarded.output(), "a line in the log")
    assert "127.0.0.1" in guarded.output() and "hunter2" not in guarded.output()


def test_the_tokens_follow_the_file(guarded: Serving, channel: Any, file: Path) -> None:
    def both(token: str) -> tuple[int, Any]:
        return status(guarded.http, "GET", "/v2", token), called(channel, "ServerMetadata", token)

    first, second = token_of(Scope.INFER), token_of("new")
    assert both(first) == (200, grpc.StatusCode.OK) and both(second) == (401, UNAUTHENTICATED)
    with streaming(channel, first) as answered:
        assert b"token" not in answered()
        digests = [hashlib.sha256(token.encode()).hexdigest() for token in (first, second)]
        replace(file, token_lines(*SCOPES).replace(*digests))
        eventually(lambda: both(second) == (200, grpc.StatusCode.OK), "the new token")
        assert both(first) == (401, UNAUTHENTICATED)
        assert b"needs a token" in answered()
    replace(file, "nonsense\n")
    eventually(lambda: both(second) and f"{file}:1" in guarded.output(), "a line about the invalid file")
    assert both(second) == (200, grpc.StatusCode.OK)
    replace(file, token_lines(*SCOPES))
    eventually(lambda: both(first) == (200, grpc.StatusCode.OK), "the first token again")


@contextlib.contextmanager
def streaming(channel: Any, token: str) -> Iterator[Callable[[], bytes]]:
    """A stream of inferences, of which each call sends an empty one and returns what comes back."""
    sent: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    call = channel.stream_stream(f"/{INFERENCE}/ModelStreamInfer")(
        iter(sent.get, None), timeout=allowed(DEADLINE), metadata=[("authorization", f"Bearer {token}")]
    )

    def answered() -> bytes:
        sent.put(b"")
        found: bytes = next(call)
        return found

    yield answered
    sent.put(None)
    assert list(call) == []


def test_clients_of_the_field_send_tokens(guarded: Serving) -> None:
    tritonhttp = pytest.importorskip("tritonclient.http")
    tritongrpc = pytest.importorskip("tritonclient.grpc")
    token = token_of(Scope.INFER)
    for module, address, header in (
        (tritonhttp, guarded.http, "Authorization"),
        (tritongrpc, guarded.grpc, "authorization"),
    ):
        with closing(module.InferenceServerClient(address)) as client:
            assert client.is_server_ready() and client.is_model_ready("digits")
            with pytest.raises(module.InferenceServerException, match="token"):
                client.get_server_metadata()
            assert client.get_server_metadata(headers={header: f"Bearer {token}"})


def test_the_lines_of_the_page_make_a_token(tmp_path: Path) -> None:
    """README.md of examples/serving, as a person would type it."""
    text = (ROOT / "examples" / "serving" / "README.md").read_text()
    (block,) = re.findall(r"```\n(TOKEN=.*?)```", text, re.DOTALL)
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    done = subprocess.run(
        ["sh", "-euc", block + "\nprintf %s $TOKEN"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    from onnx_dl.server.auth import tokens

    (token,) = tokens.read(str(tmp_path / "tokens"))
    assert tokens.find([token], done.stdout) is token
    assert token.scopes == {Scope.INFER, Scope.CONTROL}


def test_the_health_check_of_the_image(guarded: Serving) -> None:
    text = (ROOT / "examples" / "serving" / "Dockerfile").read_text().replace("\\\n", "")
    (command,) = re.findall(r"^HEALTHCHECK .*?CMD (\[.*\])$", text, re.MULTILINE)
    for address, code in ((guarded.http, 0), ("127.0.0.1:1", 1)):
        words = [word.replace("127.0.0.1:8000", address) for word in json.loads(command)]
        words[0] = sys.executable
        assert subprocess.run(words, stderr=subprocess.DEVNULL, timeout=60, check=False).returncode == code


# --- loopback, and starts ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local() -> Iterator[Serving]:
    """A server with the defaults."""
    with serving("--model", f"digits={MODEL}") as server:
        yield server


def test_a_name_that_was_pointed_to_loopback_is_refused(local: Serving) -> None:
    port = local.http.rpartition(":")[2]
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "[::1]"):
        assert asked(local.http, "GET", "/v2", {"Host": host})[0] == 200
    for path in ("/v2", "/v2/health/live", "/metrics", "/v2/models/digits/infer"):
        method = "POST" if path.endswith("infer") else "GET"
        assert asked(local.http, method, path, {"Host": f"evil.example:{port}"})[0] == 421


def test_a_page_of_another_site_is_refused(local: Serving) -> None:
    assert asked(local.http, "GET", "/v2", {"Origin": f"http://{local.http}"})[0] == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        answer, body, headers = asked(local.http, "POST", "/v2/models/digits/infer", {"Origin": origin})
        assert answer == 403 and "error" in json.loads(body)
        assert "access-control-allow-origin" not in headers


def test_the_target_in_absolute_form_does_not_stand_for_the_host(local: Serving) -> None:
    path = f"http://{local.http}/v2"
    assert asked(local.http, "GET", path, {"Host": "evil.example"})[0] in (400, 421)


def test_shared_memory_is_off(local: Serving) -> None:
    found = asked(local.http, "POST", "/v2/systemsharedmemory/region/r/register")
    assert 400 <= found[0] < 500


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--http", "0.0.0.0:0"], "--token-file"),
        (["--grpc", "0.0.0.0:0"], "--token-file"),
        (["--metrics", "[::]:0"], "--token-file"),
        (["--http", "0.0.0.0:0", "--insecure", "--client-shm", "map"], "--client-shm"),
        (["--token-file", "missing"], "No such file"),
        (["--tls-cert", "missing", "--tls-key", "missing"], "No such file"),
        (["--tls-ca", "missing"], "--tls-cert"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_start_is_refused(arguments: list[str], words: str) -> None:
    command = [sys.executable, "-m", "onnx_dl", "serve", "--model", f"digits={MODEL}"]
    free = ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]
    done = subprocess.run(
        [*command, *free, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode not in (0, None) and words in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""
