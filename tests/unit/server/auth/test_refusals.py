"""The bounded log of refused requests."""

from __future__ import annotations

from onnx_dl.server.auth.refusals import _MOST_PEERS, EVERY, Refusals


class Log:
    def __init__(self) -> None:
        self.now = 0.0
        self.lines: list[str] = []
        self.refusals = Refusals(self.lines.append, lambda: self.now)


def test_the_first_of_a_peer_is_told_at_once_and_the_others_by_their_number() -> None:
    log = Log()
    for _ in range(1000):
        log.refusals.note("10.0.0.1", "no token")
    log.refusals.note("10.0.0.2", "no token")
    assert log.lines == [
        "refused requests: no token from 10.0.0.1.",
        "refused requests: no token from 10.0.0.2.",
    ]
    log.now = EVERY
    log.refusals.note("10.0.0.2", "an unknown token")
    assert log.lines[2:] == [
        "refused requests: 999 more from 10.0.0.1.",
        "refused requests: an unknown token from 10.0.0.2.",
    ]


def test_many_peers_share_a_line() -> None:
    log = Log()
    for number in range(10 * _MOST_PEERS):
        log.refusals.note(f"::{number}", "no token")
    assert len(log.lines) == _MOST_PEERS + 1
    assert log.lines[-1] == "refused requests: no token from other peers."


def test_a_peer_without_an_address() -> None:
    log = Log()
    log.refusals.note("", "no token")
    assert log.lines == ["refused requests: no token from an unknown peer."]
