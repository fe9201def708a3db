"""A proxy runs its model in-process on macOS and Windows, with TTL, unload, snapshot and events.

Skipped as long as the package has no in-process way.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path

import pytest

from tests.support import other_platform

if __name__ != "__main__":
    from tests.system.test_other_platforms import run_here

HAS_WAY = importlib.util.find_spec("onnx_dl") is not None and (
    importlib.util.find_spec("onnx_dl.inprocess") is not None
)


@pytest.mark.skipif(not HAS_WAY, reason="there is no in-process way yet")
@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_proxy(platform: str, tmp_path: Path) -> None:
    run_here(__name__, platform, tmp_path, "use")


def use(model: str) -> None:
    import os

    import numpy as np

    import onnx_dl

    x = np.ones((2, 4), np.float32)
    with open(model, "rb") as file:
        data = file.read()
    with warnings.catch_warnings(record=True) as caught, onnx_dl.ModelHost() as host:
        warnings.simplefilter("always")
        events = host.events()

        def await_event(kind: str, name: str) -> onnx_dl.ModelEvent:
            while (event := events.get(timeout=30)).type != kind or name not in event.model:
                pass
            return event

        by_path = onnx_dl.InferenceSessionProxy(model, host=host)
        by_bytes = onnx_dl.InferenceSessionProxy(data, host=host, ttl=0)
        passing = onnx_dl.InferenceSessionProxy(model, host=host, ttl=0.05, group="passing")
        assert not by_path.is_loaded
        for proxy in (by_path, by_bytes, by_path):
            np.testing.assert_array_equal(proxy.run(None, {"x": x})[0], x)
        assert any("run in this process" in str(warning.message) for warning in caught)
        assert by_path.is_loaded
        assert {status.pid for status in host.snapshot().models if status.pid} == {os.getpid()}
        await_event("ready", os.path.basename(model))

        with by_path.session():
            by_path.run(None, {"x": x})
        assert by_path.unload()
        assert not by_path.is_loaded
        await_event("unloaded", os.path.basename(model))

        passing.run(None, {"x": x})  # the TTL ends it
        assert await_event("unloaded", os.path.basename(model)).reason == "ttl"
        assert not passing.is_loaded
        np.testing.assert_array_equal(by_path.run(None, {"x": x})[0], x)  # it loads again
        try:
            onnx_dl.InferenceSessionProxy(model, host=host, isolation=True).run(None, {"x": x})
        except onnx_dl.PlatformError as error:
            assert "need Linux 5.3" in str(error)
        else:
            raise AssertionError("isolation needs Linux")


if __name__ == "__main__":
    other_platform.pretend(sys.argv[1])
    globals()[sys.argv[3]](sys.argv[2])
