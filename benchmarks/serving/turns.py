"""Calls of one work, in all ways, of all servers in turns."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from benchmarks.report import Row
from benchmarks.serving.clients import Clients, Ran
from benchmarks.serving.servers import Mapping, OnnxDl, Server, Triton
from benchmarks.serving.works import Work
from benchmarks.timing import figure, percentile

WAYS: Final = ("HTTP", "HTTP + shm", "gRPC", "gRPC + shm", "JSON")
MANY: Final = 8


class Asked(NamedTuple):
    """Ratios to tritonserver that are asked for: p50 of one client at most, calls per second of eight at
    least."""

    p50: float | None = None
    per_second: float | None = None


ASKED: Final[dict[str, dict[str, Asked]]] = {
    "tiny": {
        "HTTP": Asked(0.8, 1.0), "HTTP + shm": Asked(0.8, 1.0),
        "gRPC": Asked(1.1, 1.0), "gRPC + shm": Asked(1.1, 1.0), "JSON": Asked(),
    },
    "5mb": {
        "HTTP": Asked(0.5, 1.0), "HTTP + shm": Asked(0.7, 1.0),
        "gRPC": Asked(0.8, 1.0), "gRPC + shm": Asked(0.7, 1.0), "JSON": Asked(0.5),
    },
    "conv": {
        "HTTP": Asked(1.0, 1.0), "HTTP + shm": Asked(1.0, 1.0),
        "gRPC": Asked(1.0, 1.0), "gRPC + shm": Asked(1.0, 1.0), "JSON": Asked(0.5),
    },
}  # fmt: skip


class Block(NamedTuple):
    """How long a block of one or of eight clients takes: seconds, and calls of each client at most."""

    seconds: float
    most: int


def _blocks(quick: bool) -> dict[int, Block]:
    if quick:
        return {1: Block(0.1, 50), MANY: Block(0.1, 50)}
    return {1: Block(0.5, 2000), MANY: Block(0.8, 2000)}


_Found = dict[tuple[str, int], list[Ran]]
"""By server and number of clients, a block a round."""


def measure(
    servers: Sequence[Server], clients: Clients, work: Work, rounds: int, *, quick: bool
) -> Iterator[Row]:
    """Rows of one work: p50 and calls per second of each server in each way, and ratios to tritonserver."""
    for way in WAYS:
        taking = [server for server in servers if way in server.ways]
        with_results = dict(_open(taking, clients, work, way))
        _compare(with_results, work, way)
        opened = [server for server in taking if server.name in with_results]
        found = _turns(opened, clients, work, way, rounds, quick)
        yield from _rows(work, way, found)
        for server in opened:
            clients.close(server, way, work, MANY)


def _open(servers: Sequence[Server], clients: Clients, work: Work, way: str) -> Iterator[tuple[str, float]]:
    """Names of the servers that answer, each with the sum of its result."""
    for server in servers:
        try:
            yield server.name, clients.open(server, way, work, MANY)
        except RuntimeError as error:
            print(f"{work.name}, {way}, {server.name}: {error}", file=sys.stderr)


def _compare(sums: dict[str, float], work: Work, way: str) -> None:
    """All servers must do the same work."""
    for name, value in sums.items():
        first = next(iter(sums.values()))
        if not math.isclose(value, first, rel_tol=1e-4):
            raise RuntimeError(f"{work.name}, {way}: {name} answers with a sum of {value}, not {first}")


def _turns(
    servers: Sequence[Server], clients: Clients, work: Work, way: str, rounds: int, quick: bool
) -> _Found:
    """Every other round goes backwards."""
    found: _Found = {}
    for turn in range(rounds):
        for count, block in _blocks(quick).items():
            for server in servers if turn % 2 else reversed(servers):
                ran = clients.run(server, way, work, count, block.seconds, block.most)
                found.setdefault((server.name, count), []).append(ran)
    return found


def _rows(work: Work, way: str, found: _Found) -> list[Row]:
    names = list(dict.fromkeys(name for name, _ in found))
    asked = ASKED[work.name][way]
    rows = []
    for name in names:
        one, many = found[name, 1], found[name, MANY]
        p50 = [percentile(ran.times, 0.5) for ran in one]
        p99 = percentile([time for ran in one for time in ran.times], 0.99)
        label = f"{work.title}, {way}"
        rows.append(figure(f"{label}, p50", name, p50, "µs", p99=p99, note=_share(one)))
        rows.append(
            figure(
                f"{label}, {MANY} clients", name, [ran.per_second for ran in many], "/s", note=_share(many)
            )
        )
    if Triton.name in names:
        for name in (OnnxDl.name, Mapping.name):
            if name in names:
                rows += _ratios(work, way, found, name, asked)
    return sorted(rows, key=lambda row: row.work)


def _ratios(work: Work, way: str, found: _Found, name: str, asked: Asked) -> list[Row]:
    def by_round(of: str, count: int) -> list[float]:
        blocks = found[of, count]
        return [percentile(ran.times, 0.5) if count == 1 else ran.per_second for ran in blocks]

    def ratio(count: int) -> list[float]:
        pairs = zip(by_round(name, count), by_round(Triton.name, count), strict=True)
        return [mine / theirs for mine, theirs in pairs]

    label, told = f"{work.title}, {way}", f"{name}, ratio to {Triton.name}"
    is_asked = name == OnnxDl.name or way.endswith("shm")
    return [
        figure(f"{label}, p50", told, ratio(1), "x", limit=asked.p50 if is_asked else None),
        figure(
            f"{label}, {MANY} clients", told, ratio(MANY), "x",
            limit=asked.per_second if is_asked else None, at_least=True,
        ),
    ]  # fmt: skip


def _share(ran: Sequence[Ran]) -> str:
    """What a call costs the clients themselves."""
    calls = sum(len(one.times) for one in ran)
    return f"clients' own: {1e6 * sum(one.cpu for one in ran) / calls:.0f} µs of CPU a call" if calls else ""
