"""When a shared host without clients ends."""

from __future__ import annotations

import pytest

from onnx_dl.supervisor.lifetime import LOOK_EVERY, HostRole, Lifetime
from onnx_dl.transport import running_hosts
from onnx_dl.transport.rendezvous import HostEntry

LINGER = 60.0
EXPECTED = 30.0
"""Until then the first client may come; the host was started at 0."""


class Host:
    """A host at a time that tests set, and what it finds when it looks."""

    def __init__(self, *, kept: bool = False) -> None:
        role = HostRole(HostEntry("unused"), foreground=kept)
        self.lifetime = Lifetime(role, LINGER, EXPECTED)
        self.found: str | None = None
        self.looks: list[float] = []

    def ends_at(self, now: float, *, clients: bool = False, models: bool = False) -> float | None:
        def look(_: HostEntry) -> str | None:
            self.looks.append(now)
            return self.found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(running_hosts, "reason_to_leave", look)
            self.lifetime.update(now, clients=clients, models=models)
        return self.lifetime.ends_at


def test_it_waits_for_its_first_client_and_lingers_after_the_last() -> None:
    host = Host()
    assert host.ends_at(1.0) == EXPECTED
    assert host.ends_at(2.0, clients=True) is None
    assert host.ends_at(10.0) == host.ends_at(20.0) == 10.0 + LINGER
    assert host.ends_at(30.0, models=True) is None
    assert host.ends_at(40.0) == 40.0 + LINGER


def test_a_client_that_was_there_between_two_questions_counts() -> None:
    host = Host()
    host.ends_at(1.0)
    host.lifetime.on_client()
    assert host.ends_at(2.0) == 2.0 + LINGER


def test_one_that_is_kept_stays() -> None:
    host = Host(kept=True)
    assert host.ends_at(1.0) is None
    host.ends_at(2.0, clients=True)
    assert host.ends_at(1000.0) is None


@pytest.mark.parametrize("models", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_one_that_is_followed_ends_when_its_clients_have_gone(models: bool, kept: bool) -> None:
    host = Host(kept=kept)
    host.ends_at(1.0, clients=True)
    host.found = "another follows"
    assert host.ends_at(2.0, clients=True, models=models) is None
    assert not host.looks  # nobody asks while there are clients
    assert host.ends_at(3.0, models=models) == 3.0
    assert host.lifetime.replaced_because == "another follows"


def test_it_looks_at_once_and_from_time_to_time() -> None:
    host = Host()
    assert host.lifetime.look_at is None
    host.ends_at(1.0, clients=True)
    assert host.lifetime.look_at is None
    host.ends_at(2.0)
    host.ends_at(3.0)
    assert host.looks == [2.0]
    assert host.lifetime.look_at == 2.0 + LOOK_EVERY
    host.found = "another follows"
    assert host.ends_at(2.0 + LOOK_EVERY) == 2.0 + LOOK_EVERY
    host.ends_at(8.0, clients=True)  # one came at the last moment
    assert host.lifetime.look_at is host.lifetime.replaced_because is None
    host.ends_at(9.0)
    assert host.looks == [2.0, 2.0 + LOOK_EVERY, 9.0]


def test_one_that_was_just_started_waits_for_who_started_it() -> None:
    """Else two versions that start at one moment could end each other's hosts before anybody came."""
    host = Host()
    host.found = "another follows"
    assert host.ends_at(1.0) == EXPECTED
    assert host.ends_at(EXPECTED) == EXPECTED
    kept = Host(kept=True)
    kept.found = "another follows"
    assert kept.ends_at(1.0) is None
    assert kept.ends_at(EXPECTED + 1) == EXPECTED + 1


def test_a_follower_that_has_gone_is_forgotten() -> None:
    host = Host()
    host.found = "another follows"
    host.ends_at(1.0)
    host.found = None
    assert host.ends_at(40.0, models=True) is None
