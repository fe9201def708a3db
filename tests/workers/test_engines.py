"""The seam for engines: a third one is a module in ``onnx_dl/workers/engines``, and a face if need be."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import onnx_dl
from onnx_dl import EventType, ModelHost, WorkerDied
from onnx_dl.core.spec import ModelSpec, file_identity, model_key
from onnx_dl.core.terms import Terms
from onnx_dl.session.model_source import ModelSource
from onnx_dl.session.proxy import ModelProxy
from onnx_dl.workers.engines import base
from tests.support.waiting import DEADLINE, allowed, is_gone, wait_for, worker_pid

SCALER = '''
"""An engine whose models are text files with a number: they multiply."""

import ctypes

import onnx_dl.workers.engines.base
from onnx_dl.core.status import ModelDescription


class Scaler:
    def __init__(self, factor):
        self.factor = factor

    def describe(self):
        return ModelDescription(details={"factor": self.factor})

    def ready(self, seconds, blobs):
        pass

    def run(self, outputs, feed, options, token):
        return [array * self.factor for array in feed.values()]

    def bind(self, outputs, feed, results):
        return None

    def rerun(self, outputs):
        return None

    def invoke(self, method, args, token):
        if method == "crash":
            ctypes.string_at(8)
        raise AttributeError(method)

    def close(self):
        pass


def open_model(spec, blobs):
    with open(spec.path) as file:
        return Scaler(float(file.read()))
'''


class Scaled(ModelProxy):
    """Its face."""

    def __init__(self, path: Path, *, ttl: float = -1, host: ModelHost) -> None:
        spec = ModelSpec(
            key=model_key(file_identity(str(path)), "scaler"),
            name=path.name,
            cwd=str(path.parent),
            engine="scaler",
            path=path.name,
        )
        super().__init__(ModelSource(spec), Terms.parse(ttl), host)

    def run(self, array: np.ndarray) -> np.ndarray:
        return self._handle.model().run(self._handle.lease, None, {"x": array}, None)[0]

    def crash(self) -> None:
        self._handle.model().invoke(self._handle.lease, "crash")


@pytest.fixture
def install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_is_left_behind: None
) -> Callable[[str, str], None]:
    """Adds a module to ``onnx_dl/workers/engines`` of an onnx_dl that only this host's processes import."""
    root = Path(onnx_dl.__file__).parent
    shutil.copytree(root, tmp_path / "site" / root.name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.syspath_prepend(tmp_path / "site")

    def install(name: str, source: str) -> None:
        (tmp_path / "site" / root.name / "workers" / "engines" / f"{name}.py").write_text(source)

    return install


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "three.txt"
    path.write_text("3")
    return path


def test_a_third_engine_is_one_more_module(
    install: Callable[[str, str], None], host: ModelHost, model: Path
) -> None:
    install("scaler", SCALER)
    with host.events() as events:
        proxy, other = Scaled(model, ttl=-1, host=host), Scaled(model, ttl=0, host=host)
        for shape in ((3,), (200, 300)):
            x = np.ones(shape, np.float32)
            for _ in range(3):
                assert (proxy.run(x) == 3 * x).all()
                assert (other.run(x) == 3 * x).all()
        assert proxy._handle.model().describe(proxy._handle.lease).details == {"factor": 3}
        pid = worker_pid(host)
        with pytest.raises(WorkerDied) as caught:
            proxy.crash()
        assert (caught.value.pid, caught.value.signal) == (pid, signal.SIGSEGV)
        proxy.close()
        other.run(x)
        assert wait_for(events, EventType.FAILED).pid == pid
        assert is_gone(wait_for(events, EventType.UNLOADED).pid or 0)


def test_what_an_engine_needs_and_lacks_is_named(
    install: Callable[[str, str], None], host: ModelHost, model: Path
) -> None:
    install("scaler", "import surely_not_installed")
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        Scaled(model, ttl=-1, host=host).load()


def test_an_engine_that_there_is_not(host: ModelHost, model: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no engine 'scaler'\."):
        Scaled(model, ttl=-1, host=host).load()


@pytest.mark.parametrize("name", ["nonsense", "", "../ort", "os.path", "gate"])
def test_only_modules_that_open_models_are_engines(name: str) -> None:
    with pytest.raises(ValueError, match="There is no engine"):
        base.load(ModelSpec(key="k", name="n", cwd="/", engine=name), {})


# What it raises, or who ends it: the kernel, when the whole machine has no memory left, sends SIGKILL.
SHORTAGES = {
    "it says so": "raise MemoryError('std::bad_alloc')",
    "it is killed": "__import__('os').kill(__import__('os').getpid(), 9)",
}


def hungry(shortage: str) -> str:
    """The source of an engine whose load fails as often as a file beside the model has characters."""
    return SCALER.replace(
        "def open_model(spec, blobs):\n",
        f"""def open_model(spec, blobs):
    with open(spec.path + ".short", "a+") as file:
        file.seek(0)
        left = file.read()
        file.truncate(0)
        file.write(left[1:])
    if left:
        {shortage}
""",
    )


@pytest.fixture(params=SHORTAGES.values(), ids=SHORTAGES)
def shortage(request: pytest.FixtureRequest, install: Callable[[str, str], None]) -> None:
    install("scaler", hungry(request.param))


def test_a_load_that_runs_out_of_memory_works_when_others_have_left(
    shortage: None, host: ModelHost, model: Path, tmp_path: Path
) -> None:
    two = tmp_path / "two.txt"
    two.write_text("2")
    x = np.ones(3, np.float32)
    idle = Scaled(two, ttl=-1, host=host)
    idle.run(x)
    Path(f"{model}.short").write_text("1")
    with host.events() as events:
        assert (Scaled(model, ttl=-1, host=host).run(x) == 3 * x).all()
        seen = [events.get(allowed(DEADLINE)) for _ in range(6)]
    assert [(event.type.value, event.model) for event in seen] == [
        ("loading", "three.txt"),
        ("failed", "three.txt"),
        ("draining", "two.txt"),
        ("unloaded", "two.txt"),
        ("loading", "three.txt"),
        ("ready", "three.txt"),
    ]
    assert seen[1].retry_after == 0.0 and seen[1].detail
    assert seen[3].reason == "evicted" and not idle.is_loaded


def test_a_load_that_runs_out_of_memory_twice_fails(shortage: None, host: ModelHost, model: Path) -> None:
    Path(f"{model}.short").write_text("12")
    proxy = Scaled(model, ttl=-1, host=host)
    with host.events() as events:
        with pytest.raises((MemoryError, WorkerDied)):
            proxy.load()
        assert [events.get(allowed(DEADLINE)).type.value for _ in range(4)] == ["loading", "failed"] * 2
        assert (proxy.run(np.ones(3, np.float32)) == 3).all()  # the third load
