"""An application that may open few files: what it has goes on, and what it cannot have is told."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from onnx_dl import InferenceSessionProxy, ModelHost
from onnx_dl.errors import DescriptorsExhausted
from onnx_dl.protocol.lane import Touch
from tests.contract.both import CPU
from tests.support.slow import identity_model
from tests.support.waiting import DEADLINE, allowed

X = {"x": np.ones(4, np.float32)}


@pytest.fixture
def few(host: ModelHost) -> Iterator[None]:
    """This process may open twenty more files, once the host runs."""
    host.start()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def opened(host: ModelHost) -> InferenceSessionProxy:
    return InferenceSessionProxy(identity_model(), providers=CPU, host=host)


def test_proxies_of_one_model_share_idle_lanes(host: ModelHost, few: None) -> None:
    proxies = [opened(host) for _ in range(316)]
    for proxy in proxies:
        assert proxy.run(None, X)[0][0] == 1


def test_idle_lanes_make_way_for_other_models(host: ModelHost, few: None) -> None:
    """A lane takes three; six models take turns all the same."""
    models = [identity_model().replace(b"identity", b"identit%x" % number) for number in range(12)]
    proxies = [InferenceSessionProxy(model, providers=CPU, host=host) for model in models]
    for _ in range(2):
        for proxy in proxies:
            assert proxy.run(None, X)[0][0] == 1


def test_a_call_that_finds_none_says_so_and_others_go_on(host: ModelHost, few: None) -> None:
    proxy = opened(host)
    held = []
    with pytest.raises(DescriptorsExhausted, match="ulimit") as raised:
        while True:
            held.append(proxy._handle.model().prepare(proxy._handle.lease, lambda lane: Touch()))
    assert raised.value.errno == errno.EMFILE and isinstance(raised.value, OSError)
    held.pop().release()
    assert proxy.run(None, X)[0][0] == 1
    for call in held:
        call.lane.close()


def test_a_burst_of_callers(host: ModelHost, few: None) -> None:
    """More threads than lanes that there could be: each has its result, or the error that says why not."""
    proxy = opened(host)
    proxy.run(None, X)
    ended: list[object] = []

    def call() -> None:
        try:
            ended.append(float(proxy.run(None, X)[0][0]))
        except Exception as error:
            ended.append(type(error))

    threads = [threading.Thread(target=call) for _ in range(60)]
    limit = allowed(4 * DEADLINE)  # it opens a file, of which there are too few soon
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(limit)
    assert len(ended) == 60 and set(ended) <= {1.0, DescriptorsExhausted}
    assert proxy.run(None, X)[0][0] == 1
