"""Steps of ``tests/system/test_other_platforms.py``, in a process that looks like another platform.

``python -m tests.support.on_other_platforms PLATFORM MODEL STEP ...``
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import os
import pkgutil
import sys
from collections.abc import Mapping

import numpy as np
import onnxruntime

from tests.support import other_platform

SKIPPED = (
    "onnx_dl.__main__",
    "onnx_dl.cli.__main__",
    "onnx_dl.cli.hook",
    "onnx_dl.integrations.__pyinstaller",
    "onnx_dl.server.",
)
"""Programs and hooks: importing them runs them, or needs PyInstaller, or the extra ``serve``.  The command
``onnx-dl serve`` itself is refused on other platforms before it imports the server."""


def import_all(_: str) -> None:
    package = importlib.import_module("onnx_dl")
    for module in pkgutil.walk_packages(package.__path__, "onnx_dl."):
        if not module.name.startswith(SKIPPED):
            importlib.import_module(module.name)
    for name in package.__all__:
        getattr(package, name)


def construct(model: str) -> None:
    import onnx_dl

    proxies = [onnx_dl.InferenceSessionProxy(given) for given in (model, read(model))]
    onnx_dl.ModelHost().close()
    assert onnx_dl.default_host().snapshot().models == []
    for proxy in proxies:
        proxy.close()


def keep_bytes(model: str) -> None:
    from onnx_dl.tensors import segment, shared_bytes
    from onnx_dl.tensors.live_initializers import LiveMemory, view

    before = descriptors()
    data = read(model) * 5000  # more than one piece of a temporary file
    for fd in (segment.freeze(data), segment.freeze(b""), shared_bytes.keep("some", data).descriptor()):
        assert segment.thaw(fd) == segment.thaw(fd)  # does not depend on the file's position
        assert segment.thaw(fd) in (data, b"")
        os.close(fd)
    weights = np.arange(5, dtype=np.uint8)
    memory = LiveMemory([weights], None)
    seen = view(memory.descriptor())
    weights += 1
    memory.refresh()
    np.testing.assert_array_equal(seen[:5], weights)
    del seen, memory
    gc.collect()
    assert descriptors() == before


def run_engine(model: str) -> None:
    """Loads and runs a model as the in-process way does, from a file, from bytes, with live initializers."""
    from onnx_dl.core.terms import WorkerOptions
    from onnx_dl.session import model_source
    from onnx_dl.workers.engines import base

    for given, options in ((model, None), (read(model), None), (read(model), with_initializer())):
        source = model_source.describe(model_source.locate(given), options, (None, None), {}, WorkerOptions())
        assert (source.live is None) == (options is None)
        descriptors_of: Mapping[str, int] = {name: make() for name, make in source.blobs.items()}
        backend = base.load(source.spec, descriptors_of)
        for fd in descriptors_of.values():
            os.close(fd)
        feed: dict[str, object] = {"x": np.ones((2, 4), np.float32)}
        [result] = backend.run(None, feed, None, base.CancelToken())
        [expected] = onnxruntime.InferenceSession(given, options).run(None, feed)
        np.testing.assert_array_equal(np.asarray(result), expected)
        assert backend.describe().providers == ["CPUExecutionProvider"]
        backend.close()


def refuse(model: str) -> None:
    """What needs worker processes raises PlatformError, or says so in one line."""
    import onnx_dl
    from onnx_dl.cli.main import main

    try:
        onnx_dl.connect("other").snapshot()
    except onnx_dl.PlatformError as error:
        assert "need Linux 5.3" in str(error), error
    else:
        raise AssertionError("a shared host needs worker processes")
    commands = (
        "demo",
        "ps",
        f"load {model}",
        f"unload {model}",
        "supervise",
        "top",
        "events --for 1",
        "stop",
    )
    for command in commands:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            code = main(command.split())
        assert code and "need Linux 5.3" in said.getvalue(), (command, code, said.getvalue())
        assert said.getvalue().count("\n") == 1, (command, said.getvalue())


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def with_initializer() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    weights = np.full((4, 4), 2, np.float32)
    options.add_initializer("w", onnxruntime.OrtValue.ortvalue_from_numpy(weights))
    return options


def descriptors() -> int:
    """The number of open descriptors."""
    count = 0
    for fd in range(256):
        with contextlib.suppress(OSError):
            os.fstat(fd)
            count += 1
    return count


if __name__ == "__main__":
    other_platform.pretend(sys.argv[1])
    for step in sys.argv[3:]:
        globals()[step](sys.argv[2])
