"""What hosts and proxies say of themselves, without asking anybody."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_dl import ConfigError, InferenceSessionProxy, ModelHost
from tests.support.sharing import Forked
from tests.support.slow import identity_model


def test_a_host(nothing_is_left_behind: None) -> None:
    host = ModelHost(memory_limit="2GB")
    assert repr(host) == "<ModelHost private, not started, 0 models used here, memory limit 2000.0 MB>"
    with host.open(identity_model()) as proxy:
        proxy.load()
        pid = host.snapshot().supervisor_pid
        assert f"private, supervisor pid {pid}, 1 model used here" in repr(host)
        assert "private, not started, 0 models" in Forked(lambda: repr(host)).result()
    host.close()
    assert "not started" in repr(host)
    assert "shared 'web', not started" in repr(ModelHost.of_name("web"))


def test_a_host_without_a_worker(nothing_is_left_behind: None) -> None:
    with ModelHost() as host, host.open(identity_model(), isolation=False) as proxy:
        proxy.load()
        assert repr(host) == "<ModelHost private, not started, 1 model used here>"
        assert str(host.snapshot()).startswith("Private host, no supervisor\n")


def test_one_whose_constructor_raised() -> None:
    assert repr(object.__new__(ModelHost)) == "<ModelHost, not set up>"
    assert "not set up" in repr(object.__new__(InferenceSessionProxy))
    with pytest.raises(ConfigError):
        ModelHost(memory_limit="much")


def test_a_proxy(host: ModelHost) -> None:
    proxy = host.open(identity_model(), ttl="5m")
    assert repr(proxy).endswith(", ttl=300, not known to be loaded>")
    proxy.run(None, {"x": np.zeros(2, np.float32)})
    assert repr(proxy).endswith(", ttl=300, loaded>")
    proxy.close()
    assert repr(proxy).endswith(", ttl=300, closed>")
