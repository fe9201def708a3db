"""Models in this process beside others: isolated ones, evictions, forks, patches, the end of a host."""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import pickle

import numpy as np
import pytest

import onnx_dl
from onnx_dl import CapacityError, ConfigError, EventType, InferenceSessionProxy, ModelHost
from onnx_dl.session import isolation
from tests.inprocess.conftest import Open
from tests.support.programs import program
from tests.support.slow import identity_model
from tests.support.waiting import wait_for
from tests.support.zoo import layers

ONE = {"x": np.ones(1, np.float32)}


def test_one_host_has_both_kinds(here: Open, host: ModelHost, path: str) -> None:
    isolated, local = host.open(path), here(path)
    host.preload([isolated, local])
    found = {status.isolated: status.pid for status in host.snapshot().models}
    assert found[False] == os.getpid() != found[True]
    for pipe in (onnx_dl.pipeline(local, isolated), onnx_dl.pipeline(isolated, local)):
        assert np.array_equal(pipe.run(None, ONE)[0], ONE["x"])
    x = host.empty(1 << 16)
    x[:] = 2
    assert np.array_equal(local.run(None, {"x": x})[0], isolated.run(None, {"x": x})[0])
    assert host.unload(path) and not host.unload(path)


def test_copies_and_coroutines(here: Open, host: ModelHost) -> None:
    proxy = here(identity_model())
    for other in (copy.copy(proxy), pickle.loads(pickle.dumps(proxy)), proxy):
        assert np.array_equal(asyncio.run(other.arun(None, ONE))[0], ONE["x"])
        other.close()
    with pytest.raises(onnx_dl.ProxyClosedError):
        proxy.run(None, ONE)
    onnx_dl.default_host().close()  # the unpickled one's


def test_an_idle_model_makes_way_and_one_that_cannot_fit_is_refused(tmp_path: object) -> None:
    big = layers(width=1024, count=2)  # 8 MB of weights
    other = layers(width=1024, count=2, seed=1)
    with ModelHost(memory_limit="45MB") as host, host.events() as events:
        first, second = (host.open(model, isolation=False) for model in (big, other))
        first.load()
        first.get_inputs()
        second.load()
        event = wait_for(events, EventType.UNLOADED)
        assert event.reason == "evicted"
        assert second.is_loaded and not first.is_loaded
    with ModelHost(memory_limit="4MB") as host, pytest.raises(CapacityError, match="limit of 4"):
        host.open(big, isolation=False, eager=True)


def test_the_host_holds_an_adopted_model_and_close_ends_all(path: str) -> None:
    with ModelHost() as host:
        status = host.open(path, isolation=False, ttl=-1).adopt()
        assert (status.isolated, status.leases) == (False, 1)
        proxy = host.open(path, isolation=False)
        proxy.run(None, ONE)
    assert np.array_equal(proxy.run(None, ONE)[0], ONE["x"])  # loaded again
    host.close()


FORK = """
import os, sys, numpy as np, onnx_dl
from tests.support.slow import identity_model
proxy = onnx_dl.InferenceSessionProxy(identity_model(), isolation=False)
x = {"x": np.ones(1, np.float32)}
proxy.run(None, x)
if (child := os.fork()) == 0:
    loaded, right = proxy.is_loaded, proxy.run(None, x)[0][0] == 1
    anew = proxy.is_loaded
    onnx_dl.default_host().close()
    os._exit(7 if right and not loaded and anew else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), proxy.is_loaded, proxy.run(None, x)[0][0])
"""


def test_a_forked_child_starts_with_nothing_loaded() -> None:
    assert program(FORK).stdout.split() == ["7", "True", "1.0"]


def test_the_setting_and_the_keyword(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, host: ModelHost, path: str
) -> None:
    monkeypatch.setenv("ONNX_DL_ISOLATION", "off")
    monkeypatch.setattr(isolation, "_told", [])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            host.open(path, max_runs=3, group="g", environment={"A": "b"}).run(None, ONE)
    assert [record.message.split(":")[0] for record in caplog.records] == ["ONNX_DL_ISOLATION=off"]
    assert all(not status.isolated for status in host.snapshot().models)
    assert host.open(path, isolation=True)._handle.spec.isolation
    with pytest.raises(ConfigError, match="environment can have no effect"):
        InferenceSessionProxy(path, isolation=False, environment={"A": "b"})
    with pytest.raises(ConfigError, match="none of True, False and None"):
        InferenceSessionProxy(path, isolation="off")


def test_without_the_platform_there_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, host: ModelHost, path: str
) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(isolation, "_told", [])
    with pytest.warns(RuntimeWarning, match="on darwin they run in this process") as told:
        proxies = [host.open(path), host.open(path)]
    assert len(told) == 1 and told[0].filename.endswith("model_host.py")
    x = host.empty((2, 3))
    assert x.ctypes.data % 64 == 0 and x.shape == (2, 3)
    host.start()  # does nothing
    assert np.array_equal(proxies[0].run(None, ONE)[0], ONE["x"])
    with pytest.raises(onnx_dl.PlatformError):
        onnx_dl.connect("team")
    with pytest.raises(onnx_dl.PlatformError):
        host.open(path, isolation=True).run(None, ONE)
