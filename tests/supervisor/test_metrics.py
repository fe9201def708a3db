"""Metrics of a real host: what a scraper sees, and that nobody notices it."""

from __future__ import annotations

import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from onnx_dl import ConfigError, EventType, ModelHost, SupervisorStartError
from tests.contract.both import CPU, scaled
from tests.supervisor.test_capacity import MB, value, weighty
from tests.support.waiting import DEADLINE, allowed, eventually, family, is_gone, wait_for, worker_pid

pytestmark = pytest.mark.slow

Samples = dict[tuple[str, ...], float]


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNX_DL_METRICS", "127.0.0.1:0")


def address(host: ModelHost) -> tuple[str, int]:
    found = host.snapshot().metrics
    assert found is not None
    name, port = found.split(":")
    return name, int(port)


def scrape(host: ModelHost) -> Samples:
    """Name and label values (without the model's short name), by the labels' names, to value."""
    with urllib.request.urlopen(
        "http://{}:{}/metrics".format(*address(host)), timeout=allowed(DEADLINE)
    ) as answer:
        text = answer.read().decode()
    return {
        (s.name, *(value for label, value in sorted(s.labels.items()) if label != "model")): s.value
        for family in parse(text)
        for s in family.samples
    }


def counted(host: ModelHost, path: str, calls: int) -> Samples:
    """A page on which so many calls of a model are counted: each is, a moment after it is answered."""
    pages: list[Samples] = []

    def is_counted() -> bool:
        pages[:] = [scrape(host)]
        return pages[0]["onnx_dl_call_seconds_count", path] == calls

    eventually(is_counted, f"{calls} calls are counted")
    return pages[0]


def test_a_day_of_a_host(nothing_is_left_behind: None, tmp_path: Path) -> None:
    paths = [weighty(tmp_path / f"m{i}.onnx", 20, i) for i in range(2)]
    with ModelHost(memory_limit=90 * MB) as host, host.events() as events:
        first, second = (host.open(path, providers=CPU) for path in paths)
        host.start()
        assert scrape(host)["onnx_dl_memory_in_use_bytes",] == 0

        for _ in range(3):
            value(first)
        value(second)  # for which the first makes room
        samples = counted(host, paths[1], 1)
        loads = {paths[i]: samples["onnx_dl_loads_total", paths[i]] for i in range(2)}
        assert loads == {paths[0]: 1, paths[1]: 1}
        assert samples["onnx_dl_call_seconds_count", paths[0]] == 3
        assert 0 < samples["onnx_dl_call_seconds_sum", paths[0]] < DEADLINE
        assert samples["onnx_dl_unloads_total", paths[0], "evicted"] == 1
        assert samples["onnx_dl_evictions_total",] == 1
        assert samples["onnx_dl_freed_bytes_total", paths[0]] > 20 * MB
        assert samples["onnx_dl_memory_limit_bytes",] == 90 * MB
        assert 20 * MB < samples["onnx_dl_memory_in_use_bytes",] <= 90 * MB
        assert samples["onnx_dl_worker_memory_bytes", "pss", paths[1]] > 20 * MB
        assert ("onnx_dl_worker_memory_bytes", "pss", paths[0]) not in samples
        assert samples["onnx_dl_models", "ready"] == 1

        second.unload()
        value(second)
        counted(host, paths[1], 2)
        psutil.Process(worker_pid(host)).kill()
        wait_for(events, EventType.FAILED)
        samples = scrape(host)
        assert samples["onnx_dl_call_seconds_count", paths[1]] == 2  # the killed worker's, too
        assert samples["onnx_dl_unloads_total", paths[1], "request"] == 1
        assert samples["onnx_dl_unloads_total", paths[1], "crash"] == 1
        assert samples["onnx_dl_failures_total", paths[1]] == 1
        assert samples["onnx_dl_load_seconds_count", paths[1]] == 2


def test_a_scrape_loads_nothing_and_keeps_nothing_loaded(host: ModelHost) -> None:
    proxy = host.open(scaled(), providers=CPU, ttl=0.5)
    host.start()
    scrape(host)
    assert not proxy.is_loaded
    with host.events() as events:
        proxy.run(None, {"x": np.ones((1, 1), np.float32)})
        gone: list[object] = []
        watch = threading.Thread(target=lambda: gone.append(wait_for(events, EventType.UNLOADED)))
        watch.start()

        def unloaded() -> bool:
            scrape(host)
            return bool(gone)

        eventually(unloaded, "the TTL runs out while somebody scrapes")
        watch.join(allowed(DEADLINE))


def test_clients_that_say_nothing_do_not_disturb(host: ModelHost) -> None:
    proxy = host.open(scaled(), providers=CPU)
    host.start()
    silent = [socket.create_connection(address(host)) for _ in range(4)]
    try:
        silent[0].sendall(b"GET /metrics HTTP/1.1\r\n")  # and no more
        silent[1].sendall(b"GET /metrics HTTP/1.1\r\n\r\n")  # and never reads
        assert proxy.run(["twice"], {"x": np.ones((1, 1), np.float32)})[0][0, 0] == 2
        proxy.unload()
        assert scrape(host)["onnx_dl_evictions_total",] == 0
        started = time.monotonic()
        host.close()
        assert time.monotonic() - started < allowed(4)  # who says nothing may take 5 seconds for it
    finally:
        for connection in silent:
            connection.close()


def test_a_port_that_is_taken(host: ModelHost, monkeypatch: pytest.MonkeyPatch) -> None:
    host.start()
    name, port = address(host)
    monkeypatch.setenv("ONNX_DL_METRICS", f"{name}:{port}")
    other = ModelHost()
    with pytest.raises(
        SupervisorStartError, match=rf"{name}:{port} \(Address already in use\)\. Use another"
    ):
        other.start()
    host.close()
    other.start()  # now it is free
    assert address(other) == (name, port)
    other.close()


def test_an_address_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNX_DL_METRICS", "9464")
    with pytest.raises(ConfigError, match="write host:port"):
        ModelHost()


@pytest.mark.parametrize("start", ["fork", "exec"])
def test_the_listener_is_the_supervisors_alone(
    nothing_is_left_behind: None, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    """Also where the template was started after it, while somebody was connected."""
    monkeypatch.setenv("ONNX_DL_START", start)
    with ModelHost() as host:
        host.start()
        with socket.create_connection(address(host)):
            (template,) = supervisor_of(host).children()
            template.kill()
            eventually(lambda: is_gone(template.pid), "the template is reaped")
            proxy = host.open(scaled(), providers=CPU)
            proxy.load()
            supervisor, *others = family(supervisor_of(host).pid)
            assert any(found.status == psutil.CONN_LISTEN for found in tcp(supervisor))
            assert others and not [process for process in others if tcp(process)]


def supervisor_of(host: ModelHost) -> psutil.Process:
    pid = host.snapshot().supervisor_pid
    assert pid is not None
    return psutil.Process(pid)


def tcp(process: psutil.Process) -> list[Any]:
    return list(process.net_connections(kind="tcp"))


def test_nobody_serves_where_nobody_asked(host: ModelHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anything imported for it: ssl, which prometheus_client brings along, tells."""
    monkeypatch.delenv("ONNX_DL_METRICS")
    host.start()
    with ModelHost() as quiet:
        quiet.start()
        assert quiet.snapshot().metrics is None
        assert not tcp(supervisor_of(quiet))
        maps = [Path(f"/proc/{supervisor_of(each).pid}/maps").read_text() for each in (host, quiet)]
        assert ["_ssl." in text for text in maps] == [True, False]


def test_health_and_other_paths(host: ModelHost) -> None:
    host.start()
    url = "http://{}:{}".format(*address(host))
    with urllib.request.urlopen(f"{url}/healthz", timeout=allowed(DEADLINE)) as answer:
        assert answer.read() == b"ok\n"
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        urllib.request.urlopen(f"{url}/other", timeout=allowed(DEADLINE))
    caught.value.close()
