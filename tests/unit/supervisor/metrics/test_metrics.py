"""What is counted, how it is written, and who is answered when."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import select
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse

from onnx_dl.core.events import EventType, ModelEvent
from onnx_dl.core.lifecycle import ModelState
from onnx_dl.core.status import ModelStatus, Usage
from onnx_dl.errors import ConfigError, SupervisorStartError
from onnx_dl.supervisor.metrics.connections import ScrapeConnections
from onnx_dl.supervisor.metrics.counters import Figures, Metrics
from onnx_dl.supervisor.metrics.endpoint import MetricsEndpoint
from onnx_dl.supervisor.metrics.families import CALLS, FAMILIES, LOADS, render
from onnx_dl.transport.gauges import Gauges, Reading, bound
from tests.support.waiting import DEADLINE, allowed, eventually

PAGE = (Path(__file__).parents[4] / "docs" / "metrics.md").read_text()
A, B = "/models/a.onnx", 'odd "name"\\\n.onnx'


def reading(*seconds: float, busy: int = 0) -> Reading:
    """What a worker tells that answered these calls."""
    gauges = Gauges()
    gauges.busy[0] = busy
    for each in seconds:
        gauges.answered(0.0, busy, each)
    return gauges.read()


def status(worker_id: int | None, model: str = A, key: str = "k", **fields: Any) -> ModelStatus:
    known = {"state": ModelState.READY, "usage": Usage(rss=300, private=200, shared=10, pss=250)} | fields
    return ModelStatus(
        model=model,
        key=key,
        worker_id=worker_id,
        pid=worker_id,
        leases=1,
        ttl=-1.0,
        loads=1,
        failures=0,
        retry_after=0.0,
        **known,
    )


class Rig:
    """Metrics, and short ways to tell them something."""

    def __init__(self, remembered: int = 10) -> None:
        self.metrics = Metrics(remembered)
        self.live: dict[int, Reading] = {}
        self._seq = 0

    def event(self, kind: EventType, worker_id: int, model: str = A, **fields: Any) -> None:
        self._seq += 1
        self.metrics.on_event(
            ModelEvent(seq=self._seq, type=kind, at=0.0, model=model, key="k", worker_id=worker_id, **fields)
        )

    def load(self, worker_id: int, model: str = A, seconds: float = 0.5) -> None:
        self.event(EventType.LOADING, worker_id, model)
        self.event(EventType.READY, worker_id, model, seconds=seconds)
        self.live[worker_id] = Reading()

    def gone(self, worker_id: int, reason: str = "ttl", model: str = A, freed: int = 100) -> None:
        self.metrics.on_gone(worker_id, self.live.pop(worker_id))
        self.event(EventType.UNLOADED, worker_id, model, reason=reason, freed=freed)

    def figures(self, *models: ModelStatus, limit: int | None = 1000) -> Figures:
        return self.metrics.figures(models, self.live, limit, 400)

    def samples(self, *models: ModelStatus) -> dict[tuple[str, ...], float]:
        """The text, parsed: name and label values (without the model's short name), by the labels' names, to
        value."""
        text, _ = render(self.figures(*models))
        return {
            (s.name, *(value for label, value in sorted(s.labels.items()) if label != "model")): s.value
            for family in parse(text.decode())
            for s in family.samples
        }


def test_nothing_happened() -> None:
    samples = Rig().samples()
    assert samples["onnx_dl_evictions_total",] == 0
    assert samples["onnx_dl_models", "ready"] == 0
    assert samples["onnx_dl_memory_in_use_bytes",] == 400
    assert not [name for name, *_ in samples if name.startswith(("onnx_dl_load_", "onnx_dl_call_"))]


def test_a_process_that_makes_way_before_its_load_is_no_model_that_was_evicted() -> None:
    rig = Rig()
    rig.event(EventType.LOADING, 1)
    rig.live[1] = Reading()
    rig.gone(1, "evicted", freed=7)
    rig.load(2)
    rig.gone(2, "evicted", freed=100)
    samples = rig.samples()
    assert samples["onnx_dl_evictions_total",] == 1
    assert samples["onnx_dl_unloads_total", A, "evicted"] == 1
    assert samples["onnx_dl_freed_bytes_total", A] == 107


def test_what_happened_is_counted_by_model() -> None:
    rig = Rig()
    rig.load(1)
    rig.load(2, B, seconds=0.25)
    rig.gone(1, "evicted", freed=100)
    rig.load(3, seconds=2.0)
    rig.gone(3, "recycled", freed=11)
    rig.event(EventType.LOADING, 4)
    rig.metrics.on_gone(4, Reading())
    rig.event(EventType.FAILED, 4)
    rig.event(EventType.THRASH, 4)
    samples = rig.samples(status(2, B))
    assert samples["onnx_dl_loads_total", A] == 2
    assert samples["onnx_dl_loads_total", B] == 1
    assert samples["onnx_dl_load_seconds_sum", A] == 2.5
    assert samples["onnx_dl_load_seconds_count", A] == 2
    assert samples["onnx_dl_unloads_total", A, "evicted"] == 1
    assert samples["onnx_dl_unloads_total", A, "recycled"] == 1
    assert samples["onnx_dl_failures_total", A] == 1
    assert samples["onnx_dl_failures_total", B] == 0
    assert samples["onnx_dl_freed_bytes_total", A] == 111
    assert samples["onnx_dl_evictions_total",] == 1
    assert samples["onnx_dl_recycled_total",] == 1
    assert samples["onnx_dl_thrash_warnings_total",] == 1
    assert samples["onnx_dl_memory_limit_bytes",] == 1000


def test_calls_of_all_generations_add_up() -> None:
    """A count never goes down, whatever becomes of workers."""
    rig = Rig()
    before: dict[tuple[str, ...], float] = {}
    kinds = {family.name: family.type for family in parse(render(rig.figures())[0].decode())}
    for worker_id in range(1, 5):
        rig.load(worker_id)
        for calls in (1, 5):
            rig.live[worker_id] = reading(*[0.001 * worker_id] * calls)
            before = not_less(before, rig.samples(status(worker_id)))
        rig.gone(worker_id)
        before = not_less(before, rig.samples())
    assert before["onnx_dl_call_seconds_count", A] == 20
    assert before["onnx_dl_call_seconds_sum", A] == pytest.approx(0.001 * 5 * (1 + 2 + 3 + 4))
    assert before["onnx_dl_unloads_total", A, "ttl"] == 4
    assert "onnx_dl_call_seconds" in kinds


def not_less(
    before: dict[tuple[str, ...], float], after: dict[tuple[str, ...], float]
) -> dict[tuple[str, ...], float]:
    counts = {k: v for k, v in after.items() if k[0].endswith(("_total", "_bucket", "_count", "_sum"))}
    assert set(before) <= set(counts)
    assert not [key for key, value in before.items() if counts[key] < value]
    return counts


def test_a_call_is_counted_in_the_buckets_that_it_belongs_to() -> None:
    """To the nanosecond: no bucket of a worker's page lies across a bound."""
    rig = Rig()
    rig.load(1)
    calls = [2e-5, 1.3e-4, 1.32e-4, 0.5, 0.6, 70.0, 5000.0]
    rig.live[1] = reading(*calls)
    samples = rig.samples(status(1))
    found = [
        (float(key[1]), value) for key, value in samples.items() if key[0] == "onnx_dl_call_seconds_bucket"
    ]
    assert len(found) == len(CALLS) + 1
    assert found == sorted(found)
    for end, count in found:
        assert count == sum(call <= end for call in calls)
    assert found[-1][1] == samples["onnx_dl_call_seconds_count", A] == len(calls)
    assert samples["onnx_dl_call_seconds_sum", A] == pytest.approx(sum(calls))


@pytest.mark.parametrize(("ends", "first"), [(CALLS, 1 << 15), (LOADS, 1 << 22)])
def test_bounds_double(ends: list[int], first: int) -> None:
    assert [bound(end) for end in ends] == [(first << i) / 1e9 for i in range(len(ends))]


def test_one_file_loaded_in_two_ways_is_one_model() -> None:
    rig = Rig()
    for worker_id in (1, 2):
        rig.load(worker_id)
        rig.live[worker_id] = reading(0.001, busy=1)
    text = render(rig.figures(status(1, busy=1), status(2, key="other", busy=2), status(None, key="third")))[
        0
    ]
    assert len(text.splitlines()) == len(set(text.splitlines()))
    samples = rig.samples(status(1, busy=1), status(2, key="other", busy=2), status(None, key="third"))
    assert samples["onnx_dl_call_seconds_count", A] == 2
    assert samples["onnx_dl_calls_in_progress", A] == 3
    assert samples["onnx_dl_worker_memory_bytes", "pss", A] == 500
    assert ("onnx_dl_worker_memory_bytes", "gpu", A) not in samples
    assert samples["onnx_dl_models", "ready"] == 3


def test_a_model_is_named_by_its_file_and_told_apart_by_its_path() -> None:
    rig = Rig()
    models = ("/a/asr.onnx", "/b/asr.onnx", "bytes:0123456789ab", "group:speech", "asr.onnx")
    for worker_id, model in enumerate(models):
        rig.load(worker_id, model)
    text = render(rig.figures())[0].decode()
    (loads,) = [family for family in parse(text) if family.name == "onnx_dl_loads"]
    assert [(s.labels["model"], s.labels["path"]) for s in loads.samples] == [
        ("asr.onnx", "/a/asr.onnx"),
        ("asr.onnx", "/b/asr.onnx"),
        ("bytes:0123456789ab", ""),
        ("group speech", ""),
        ("asr.onnx", "asr.onnx"),
    ]


def test_gpu_where_it_is_known() -> None:
    samples = Rig().samples(status(1, usage=Usage(rss=1, gpu=77)))
    assert samples["onnx_dl_worker_memory_bytes", "gpu", A] == 77


def test_no_limit() -> None:
    text = render(Rig().figures(limit=None))[0].decode()
    assert "\nonnx_dl_memory_limit_bytes " not in text


def test_only_so_many_models_are_remembered() -> None:
    """Who has a worker is; of the others those that were heard of last are."""
    rig = Rig(remembered=3)
    rig.load(1, "stays")
    rig.live[1] = reading(0.001)
    for worker_id, model in enumerate("abcd", 2):
        rig.load(worker_id, model)
        rig.gone(worker_id, "evicted", model)
    samples = rig.samples(status(1, "stays"))
    assert {key[1] for key in samples if key[0] == "onnx_dl_loads_total"} == {"stays", "c", "d"}
    assert samples["onnx_dl_call_seconds_count", "stays"] == 1
    assert samples["onnx_dl_evictions_total",] == 4


def test_more_live_workers_than_are_remembered() -> None:
    rig = Rig(remembered=2)
    for worker_id, model in enumerate("abcd", 1):
        rig.load(worker_id, model)
    assert len(rig.figures().totals) == 4
    for worker_id, model in enumerate("abcd", 1):
        rig.gone(worker_id, model=model)
    rig.load(5, "e")
    assert set(rig.figures().totals) == {"d", "e"}


def test_facts_do_not_change_any_more() -> None:
    rig = Rig()
    rig.load(1)
    figures = rig.figures()
    before = render(figures)
    rig.live[1] = reading(0.001)
    rig.gone(1, "evicted")
    assert render(figures) == before


def test_openmetrics() -> None:
    rig = Rig()
    rig.load(1, B)
    text, content_type = render(rig.figures(status(1, B)), "application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    families = {family.name: family for family in parse_open(text.decode())}
    assert families["onnx_dl_loads"].samples[0].labels == {"model": B, "path": B}


def test_the_page_tells_every_family() -> None:
    kinds = {family.name: family.type for family in parse(render(Rig().figures())[0].decode())}
    told = re.findall(r"^\| `(\w+)` \| (\w+) \| ([^|]*) \|", PAGE, flags=re.MULTILINE)
    real = []
    for family in FAMILIES:
        kind = family.metric(Rig().figures()).type
        name = family.name + ("_info" if kind == "info" else "")
        labels = ("version",) if kind == "info" else family.labels
        real.append((name, kind, ", ".join(f"`{label}`" for label in labels)))
    assert told == real
    assert {name.removesuffix("_total") for name, _, _ in told} == set(kinds)


def test_the_sample_on_the_page_is_what_is_written() -> None:
    (sample,) = re.findall(r"```text\n(.*?)```", PAGE, flags=re.DOTALL)
    names = {s.name for family in parse(sample) for s in family.samples}
    rig = Rig()
    rig.load(1)
    rig.gone(1)
    rig.load(2)
    real = {s.name for family in parse(render(rig.figures(status(2)))[0].decode()) for s in family.samples}
    assert names and names <= real


# --- over HTTP ---------------------------------------------------------------------------------------------


def measured() -> Figures:
    rig = Rig()
    rig.load(1)
    return rig.figures(status(1))


@contextlib.contextmanager
def listening(patience: float, address: str = "127.0.0.1:0") -> Iterator[MetricsEndpoint]:
    """Closed at the end, when the threads of its connections have ended, too: they hold on to it."""
    scrape = MetricsEndpoint(address, patience)
    try:
        yield scrape
    finally:
        scrape.close()
        eventually(lambda: not serving(), "the threads have ended")


@pytest.fixture
def scrape() -> Iterator[MetricsEndpoint]:
    with listening(DEADLINE) as scrape:
        yield scrape


def get(scrape: MetricsEndpoint, path: str = "/metrics", method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection(scrape.address, timeout=allowed(DEADLINE))
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def ask(
    scrape: MetricsEndpoint, count: int, path: str = "/metrics"
) -> tuple[list[threading.Thread], list[Any]]:
    answers: list[Any] = []
    threads = [threading.Thread(target=lambda: answers.append(get(scrape, path))) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, answers


def serving() -> int:
    """Connections that have a thread."""
    return sum("process_request" in thread.name for thread in threading.enumerate())


@pytest.mark.parametrize("path", ["/", "/metrics", "/metrics?x=y"])
def test_the_loop_answers(scrape: MetricsEndpoint, path: str) -> None:
    threads, answers = ask(scrape, 1, path)

    def answered() -> bool:
        scrape.answer(measured)
        return bool(answers)

    eventually(answered, "an answer")
    threads[0].join(allowed(DEADLINE))
    assert answers[0][0] == 200
    assert f'onnx_dl_loads_total{{model="a.onnx",path="{A}"}} 1.0' in answers[0][1]


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [("/healthz", "GET", 200), ("/metric", "GET", 404), ("/metrics", "POST", 501)],
)
def test_what_the_loop_is_not_asked_for(scrape: MetricsEndpoint, path: str, method: str, status: int) -> None:
    assert get(scrape, path, method)[0] == status


def test_a_loop_that_does_not_answer() -> None:
    with listening(1.0) as scrape:
        assert get(scrape)[0] == 503
        scrape.answer(lambda: pytest.fail("who gave up is not measured for"))


def test_who_waits_together_is_measured_for_once() -> None:
    measurements: list[Figures] = []
    with listening(DEADLINE) as scrape:
        threads, answers = ask(scrape, 4)
        eventually(lambda: scrape._waiting.qsize() == 4, "four questions")
        scrape.answer(lambda: measurements.append(measured()) or measurements[-1])
        for thread in threads:
            thread.join(allowed(DEADLINE))
    assert [status for status, _ in answers] == [200] * 4
    assert len(measurements) == 1


def test_who_waits_is_sent_away_at_the_end() -> None:
    with listening(2 * DEADLINE) as scrape:
        threads, answers = ask(scrape, 1)
        eventually(lambda: scrape._waiting.qsize(), "a question")
    threads[0].join(allowed(DEADLINE))
    assert answers[0][0] == 503


def test_more_connections_than_are_served() -> None:
    """Who comes is served: of those who say nothing, the one that has done so for longest makes way."""
    with listening(10 * DEADLINE) as scrape:
        silent = [http.client.HTTPConnection(scrape.address, timeout=allowed(DEADLINE)) for _ in range(40)]
        for connection in silent:
            connection.connect()
        eventually(lambda: len(closed(silent)) >= 24, "the others are closed")
        eventually(lambda: 0 < serving() <= 16, "no more than sixteen are served")
        assert get(scrape, "/healthz") == (200, "ok\n")
        for connection in silent:
            connection.close()


def test_one_that_asks_byte_by_byte_is_cut_off() -> None:
    """A byte now and then is no reason to wait for the next."""
    with listening(0.3) as scrape, contextlib.closing(connected(scrape)) as slow:
        dripping = iter(b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 10_000)

        def is_cut() -> bool:
            try:
                slow.sock.send(bytes([next(dripping)]))
            except OSError:
                return True
            return bool(closed([slow]))

        eventually(is_cut, "the end of its time")


def connected(scrape: MetricsEndpoint) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(scrape.address, timeout=allowed(DEADLINE))
    connection.connect()
    return connection


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("127.0.0.1:9464", 200),
        ("[::1]:9464", 200),
        ("192.0.2.7", 200),
        ("localhost:1", 200),
        ("LOCALHOST.", 200),
        (os.uname().nodename, 200),
        ("rebound.example:9464", 421),
        ("127.0.0.1.rebound.example", 421),
        ("localhost.rebound.example", 421),
        ("", 421),
    ],
)
def test_whom_the_page_is_for(scrape: MetricsEndpoint, name: str, status: int) -> None:
    with contextlib.closing(connected(scrape)) as connection:
        connection.putrequest("GET", "/healthz", skip_host=True)
        connection.putheader("Host", name)
        connection.endheaders()
        answer = connection.getresponse()
        assert answer.status == status
        assert (b"localhost" in answer.read()) == (status == 421)


def test_programs_that_name_no_host_are_served(scrape: MetricsEndpoint) -> None:
    with contextlib.closing(connected(scrape)) as connection:
        connection.sock.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert b"200 OK" in connection.sock.recv(4096)


def test_how_long_each_may_take() -> None:
    scrapers = ScrapeConnections(timeout=5.0, most=3)
    for at, who in enumerate("abc"):
        assert scrapers.accept(who, at) == (True, None)
    scrapers.on_request("a", 3.0)
    assert scrapers.accept("d", 3.0) == (True, "b")  # the slowest of those who have not asked
    scrapers.on_request("b", 3.0)  # it was cut off meanwhile
    assert scrapers.next_deadline() == 7.0
    assert scrapers.overdue(8.0) == ["c", "d"]
    assert scrapers.overdue(8.0) == []
    for who in "ef":
        scrapers.accept(who, 8.0)
        scrapers.on_request(who, 8.0)
    assert scrapers.accept("g", 8.0) == (False, None)  # all are about to be answered
    scrapers.on_closed("a")
    assert scrapers.accept("g", 8.0) == (True, None)


def closed(connections: list[http.client.HTTPConnection]) -> list[Any]:
    """The sockets of those that the server closed."""
    return select.select([connection.sock for connection in connections], [], [], 0)[0]


def test_who_says_nothing_is_cut_off() -> None:
    with listening(0.3) as scrape, contextlib.closing(connected(scrape)) as silent:
        assert silent.sock.recv(1) == b""


def test_a_port_that_is_taken(scrape: MetricsEndpoint) -> None:
    with pytest.raises(
        SupervisorStartError, match=rf"{scrape.address} \(Address already in use\)\. Use another"
    ):
        MetricsEndpoint(scrape.address)


@pytest.mark.parametrize("address", ["nonsense.invalid:0", "192.0.2.1:0"])
def test_where_nobody_can_listen(address: str) -> None:
    with pytest.raises(SupervisorStartError, match=f"cannot be served at {address}"):
        MetricsEndpoint(address)


def test_no_address() -> None:
    with pytest.raises(ConfigError, match="write host:port"):
        MetricsEndpoint("9464")


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="no IPv6 here")
def test_ipv6() -> None:
    with listening(DEADLINE, "[::1]:0") as scrape:
        assert scrape.address.startswith("[::1]:")
        assert get(scrape, "/healthz")[0] == 200
