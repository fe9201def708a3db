"""Models of one group live in one worker."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_dl import (
    ConfigError,
    EngineError,
    EventType,
    ExecutionSession,
    InferenceSessionProxy,
    LoadTimeout,
    ModelEvent,
    ModelHost,
)
from tests.contract.both import CPU, F, model, node, scaled, tensor
from tests.support.mlir import compiler
from tests.support.waiting import DEADLINE, allowed, eventually, is_gone, worker_pid

pytestmark = pytest.mark.slow

X = np.full((1, 3), 5, np.float32)


def unary(op: str) -> bytes:
    return model([node(op, ["x"], ["y"])], [tensor("x", F, [1, 3])], [tensor("y", F, [1, 3])])


def value(proxy: InferenceSessionProxy) -> float:
    return float(proxy.run(None, {"x": X})[0][0, 0])


def opened(host: ModelHost, *ops: str, **terms: Any) -> list[InferenceSessionProxy]:
    return [host.open(unary(op), providers=CPU, group="speech", **terms) for op in ops]


def test_one_worker_and_one_load(host: ModelHost) -> None:
    seen: list[ModelEvent] = []
    host.on_event(seen.append)
    neg, root, absolute = opened(host, "Neg", "Sqrt", "Abs")
    assert [value(neg), value(root), value(absolute)] == [-5, pytest.approx(5**0.5), 5]
    (status,) = host.snapshot().models
    assert status.model == "group:speech" and len(status.members) == 3
    assert [proxy.is_loaded for proxy in (neg, root, absolute)] == [True] * 3
    assert neg.unload()
    assert not root.is_loaded
    assert [event.type for event in seen].count(EventType.LOADING) == 1
    assert value(root) == pytest.approx(5**0.5)


def test_each_says_of_itself_what_it_is(host: ModelHost) -> None:
    first = host.open(scaled(), providers=CPU, group="g")
    second = host.open(unary("Neg"), providers=CPU, group="g")
    assert [output.name for output in second.get_outputs()] == ["y"]
    assert "twice" in [output.name for output in first.get_outputs()]


def test_one_that_comes_later_joins_the_others(host: ModelHost) -> None:
    """The worker is replaced by one that has them all, between calls; nobody sees an error."""
    (neg,) = opened(host, "Neg")
    assert value(neg) == -5
    first = worker_pid(host)
    wrong: list[object] = []
    stop = threading.Event()

    def calls() -> None:
        while not stop.is_set():
            if (found := value(neg)) != -5:
                wrong.append(found)

    threads = [threading.Thread(target=calls) for _ in range(3)]
    for thread in threads:
        thread.start()
    (absolute,) = opened(host, "Abs")
    assert value(absolute) == 5
    stop.set()
    for thread in threads:
        thread.join(allowed(DEADLINE))
    assert not wrong
    second = worker_pid(host)
    assert second != first and is_gone(first)
    assert value(neg) == -5 and worker_pid(host) == second


def test_a_member_that_does_not_load_takes_no_other_with_it(host: ModelHost, tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"no model")
    (neg,) = opened(host, "Neg")
    broken = host.open(str(bad), providers=CPU, group="speech")
    with pytest.raises(Exception, match="Protobuf parsing failed"):
        value(broken)
    assert value(neg) == -5
    pid = worker_pid(host)
    with pytest.raises(Exception, match="Protobuf parsing failed"):
        value(broken)
    assert worker_pid(host) == pid
    assert not broken.is_loaded


def test_alone_in_a_group_with_a_file_that_is_no_model(host: ModelHost, tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"no model")
    with pytest.raises(Exception, match="Protobuf parsing failed"):
        value(host.open(str(bad), providers=CPU, group="speech"))


def test_the_longest_ttl_counts_and_the_last_proxy_takes_all_with_it(host: ModelHost) -> None:
    neg, absolute = opened(host, "Neg", "Abs", ttl=60)
    absolute.ttl = 600
    value(neg)
    assert value(absolute) == 5
    (status,) = host.snapshot().models
    assert (status.ttl, status.leases) == (600, 2)
    pid = worker_pid(host)
    neg.close()
    assert value(absolute) == 5 and worker_pid(host) == pid
    with host.events() as events:
        absolute.close()
        while events.get(allowed(DEADLINE)).type is not EventType.UNLOADED:
            pass
    assert is_gone(pid)


def test_a_crash_of_one_is_a_crash_of_all(host: ModelHost) -> None:
    neg, absolute = opened(host, "Neg", "Abs")
    assert [value(neg), value(absolute)] == [-5, 5]
    first = worker_pid(host)
    os.kill(first, signal.SIGKILL)
    eventually(lambda: not (neg.is_loaded or absolute.is_loaded), "the host knows")
    assert is_gone(first)
    assert [value(neg), value(absolute)] == [-5, 5]
    assert worker_pid(host) != first


def test_the_same_file_in_a_group_and_by_itself(host: ModelHost) -> None:
    (grouped,) = opened(host, "Neg")
    alone = host.open(unary("Neg"), providers=CPU)
    assert [value(grouped), value(alone)] == [-5, -5]
    assert sorted(len(status.members) for status in host.snapshot().models) == [0, 1]


def test_models_of_different_engines(host: ModelHost, tmp_path: Path) -> None:
    (neg,) = opened(host, "Neg")
    compiled = ExecutionSession(compiler(tmp_path)("identity"), group="speech", host=host)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert np.array_equal(compiled.run([x])[0], x)
    assert value(neg) == -5
    (status,) = host.snapshot().models
    assert len(status.members) == 2


@pytest.mark.parametrize("name", ["", " ", 5])
def test_names_that_are_none(host: ModelHost, name: Any) -> None:
    with pytest.raises(ConfigError, match="not a group name"):
        InferenceSessionProxy(scaled(), host=host, group=name)


def test_what_is_closed_keeps_nobody_from_joining(host: ModelHost) -> None:
    """Its bytes are nobody's any more, so it could not be loaded with the others."""
    neg, absolute = opened(host, "Neg", "Abs")
    assert [value(neg), value(absolute)] == [-5, 5]
    neg.close()
    del neg
    (root,) = opened(host, "Sqrt")
    assert value(root) == pytest.approx(5**0.5)
    (status,) = host.snapshot().models
    assert len(status.members) == 2


def test_a_model_whose_bytes_are_gone_keeps_nobody_from_joining(host: ModelHost) -> None:
    """The host holds it, and nobody has what it would be loaded from again."""
    (neg,) = opened(host, "Neg")
    neg.adopt()
    neg.close()
    del neg
    (absolute,) = opened(host, "Abs")
    assert value(absolute) == 5
    (status,) = host.snapshot().models
    assert len(status.members) == 1


def test_a_model_whose_working_directory_is_gone_is_loaded_like_the_others(
    host: ModelHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (neg,) = opened(host, "Neg")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").rmdir()
    (absolute,) = opened(host, "Abs")
    assert [value(neg), value(absolute)] == [-5, 5]


def test_a_group_of_more_bytes_than_one_worker_is_handed(host: ModelHost) -> None:
    """Linux takes so many descriptors in a message; the host stays, and so do the others."""
    many = [node("Neg", ["x"], ["y"], name=str(number)) for number in range(130)]
    ends = [tensor("x", F, [1, 3])], [tensor("y", F, [1, 3])]
    proxies = [host.open(model([each], *ends), providers=CPU, group="speech") for each in many]
    assert value(proxies[0]) == -5
    (status,) = host.snapshot().models
    assert len(status.members) == 125
    with pytest.raises(EngineError, match="more than 125"):
        [value(proxy) for proxy in proxies]


def test_who_joins_inside_of_a_block_that_holds_the_group_is_told(
    nothing_is_left_behind: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block waits for the call, and the call for the block."""
    monkeypatch.setenv("ONNX_DL_LOAD_TIMEOUT", "100")
    monkeypatch.setenv("ONNX_DL_ROOM_TIMEOUT", "0")
    with ModelHost() as host:
        (neg,) = opened(host, "Neg")
        with neg.session():
            monkeypatch.setattr("onnx_dl.client.acquisition.LOAD_MARGIN", allowed(1.5) - 100)
            (absolute,) = opened(host, "Abs")
            with pytest.raises(LoadTimeout, match=r" seconds.*session\(\) block"):
                value(absolute)
            assert value(neg) == -5
        assert value(absolute) == 5
