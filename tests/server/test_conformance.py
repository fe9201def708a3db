"""tritonclient's calls get the answers that tritonserver gives; ``conformance.record`` recorded these."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("tritonclient.http")
pytest.importorskip("tritonclient.grpc")

from tests.server.conformance import differences, models
from tests.server.conformance.clients import KINDS
from tests.server.conformance.compared import agree, essence, plain_essence
from tests.server.conformance.plain import REQUESTS
from tests.server.conformance.record import RECORDED
from tests.server.conformance.run import outcomes
from tests.server.conformance.steps import STEPS
from tests.support.serving import serving


class Ran:
    """Answers of our server and of tritonserver."""

    def __init__(self, ours: dict[str, Any], used: dict[str, set[str]]) -> None:
        self.ours, self.used = ours, used
        self.theirs: dict[str, Any] = json.loads(RECORDED.read_text())


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    folder = tmp_path_factory.mktemp("repository")
    models.write(folder, for_triton=False)
    load = [word for name in models.LOADED for word in ("--load-model", name)]
    used: dict[str, set[str]] = {}
    with serving(
        "--repository", folder, "--model-control", "explicit", "--client-shm", "copy", *load
    ) as server:
        yield Ran(outcomes(server.http, server.grpc, used), used)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", STEPS)
def test_a_call_gets_tritons_answer(ran: Ran, step: str, kind: str) -> None:
    ours = essence(step, ran.ours[step][kind])
    theirs = essence(step, ran.theirs[step][kind])
    expected: object = differences.SAME
    if (found := differences.CALLS.get(step)) is not None:
        expected = found.http if kind.startswith("http") else found.grpc
    if expected is differences.SAME:
        assert agree(ours, theirs), (ours, theirs, ran.ours[step][kind].get("message"))
    else:
        assert ours == expected, ran.ours[step][kind].get("message")
        assert not agree(ours, theirs), "no difference any more"


@pytest.mark.parametrize("name", REQUESTS)
def test_a_plain_request_gets_tritons_answer(ran: Ran, name: str) -> None:
    ours, theirs = (plain_essence(each["plain"][name]) for each in (ran.ours, ran.theirs))
    if name in differences.PLAIN:
        expected, _ = differences.PLAIN[name]
        assert ours == expected, ran.ours["plain"][name]
        assert not agree(ours, theirs), "no difference any more"
    else:
        assert agree(ours, theirs), (ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_each_method_of_the_client_was_called(ran: Ran, kind: str) -> None:
    """A method that a newer client has fails this until a step calls it."""
    client = importlib.import_module(f"tritonclient.{kind}").InferenceServerClient
    public = {name for name, _ in inspect.getmembers(client, callable) if not name.startswith("_")}
    assert public - ran.used[kind] == set()


def test_what_differs_is_named_with_a_reason() -> None:
    assert differences.CALLS.keys() <= STEPS.keys()
    assert differences.PLAIN.keys() <= REQUESTS.keys()
    reasons = [each[-1] for table in (differences.CALLS, differences.PLAIN) for each in table.values()]
    assert all(len(reason.split()) > 3 for reason in reasons)
