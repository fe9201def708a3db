"""``patch()`` and ``onnx-dl run``: onnxruntime's own class opens models in workers."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnxruntime import InferenceSession  # as a package that was imported before has it

import onnx_dl
from onnx_dl import ConfigError, ModelHost
from onnx_dl.integrations import onnxruntime_patch
from onnx_dl.integrations.patch_settings import parse_models
from tests.contract.both import CPU, fixed, scaled

pytestmark = pytest.mark.slow

X = np.ones((2, 3), np.float32)
TWICE = (["twice"], {"x": X})


class Held:
    """Keeps the class where no module has it."""

    made_by = InferenceSession


class Picklable(InferenceSession):
    """A subclass that can be pickled, as insightface has one."""

    def __init__(self, path: str, **kwargs: Any) -> None:
        super().__init__(path, **kwargs)
        self.path = path

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return [result + 1 for result in super().run(*args, **kwargs)]

    def __getstate__(self) -> dict[str, str]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]


@pytest.fixture(autouse=True)
def not_left_patched(nothing_is_left_behind: None) -> Iterator[None]:
    original = InferenceSession.__init__
    yield
    while onnxruntime_patch._active:
        onnx_dl.unpatch()
    assert InferenceSession.__init__ is original


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "scaled.onnx").write_bytes(scaled())
    return str(tmp_path / "scaled.onnx")


def models(host: ModelHost) -> list[str]:
    return [status.model for status in host.snapshot().models]


def test_the_class_stays_what_it_is(host: ModelHost, path: str) -> None:
    with onnx_dl.patch(ttl=60, host=host):
        made = [cls(path, providers=CPU) for cls in (InferenceSession, Held.made_by)]
        made.append(onnxruntime.InferenceSession(path_or_bytes=path, providers=CPU))
    assert models(host) == [path]
    for session in made:
        assert type(session) is InferenceSession
        assert session.run(*TWICE)[0][0, 0] == 2  # also when the patch is taken back
        assert session.get_providers() == CPU
        assert session.ttl == 60
    assert "_onnx_dl_proxy" not in vars(InferenceSession(path, providers=CPU))


def test_sessions_that_were_there_before_stay_where_they_are(host: ModelHost, path: str) -> None:
    before = InferenceSession(path, providers=CPU)
    with onnx_dl.patch(host=host):
        assert before.run(*TWICE)[0][0, 0] == 2
        assert not models(host)
        (told,) = [found for found in onnx_dl.unpatched_report() if found.model == path]
        assert "no patch() was in force" in str(told)
        with pytest.raises(AttributeError, match="'InferenceSession' object has no attribute 'ttl'"):
            _ = before.ttl


def test_a_subclass(host: ModelHost, path: str) -> None:
    with onnx_dl.patch(host=host):
        session = Picklable(path, providers=CPU)
        assert session.run(*TWICE)[0][0, 0] == 3
        again = pickle.loads(pickle.dumps(session))
        assert again.run(*TWICE)[0][0, 0] == 3
        assert isinstance(again, InferenceSession)
    assert set(models(host)) == {path}


def test_every_method_asks_the_proxy(host: ModelHost) -> None:
    with onnx_dl.patch(host=host):
        session = InferenceSession(fixed(), providers=CPU)
        public = [name for name in dir(InferenceSession) if not name.startswith("_")]
        assert len(public) > 25
        for name in public:
            if name.startswith("get_") and name != "get_provider_graph_assignment_info":
                getattr(session, name)()
        assert session._model_bytes == fixed()
        binding = onnxruntime.IOBinding(session)
        binding.bind_cpu_input("a", np.ones((2, 3), np.float32))
        binding.bind_cpu_input("b", np.ones((1, 3), np.float32))
        binding.bind_output("sum")
        session.run_with_iobinding(binding)
        assert binding.copy_outputs_to_cpu()[0][0, 0] == 2


def test_what_is_wrong_is_raised_in_the_constructor(host: ModelHost, tmp_path: Path) -> None:
    with onnx_dl.patch(host=host):
        with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.NoSuchFile):
            InferenceSession(str(tmp_path / "nope.onnx"))
        with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidProtobuf):
            InferenceSession(b"garbage")
    with onnx_dl.patch(host=host, eager=False):
        session = InferenceSession(b"garbage")
        with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidProtobuf):
            session.get_inputs()


def test_settings_by_glob(host: ModelHost, path: str, tmp_path: Path) -> None:
    (tmp_path / "vad_tiny.onnx").write_bytes(scaled())
    settings = {"vad*.onnx": {"ttl": "-1"}, "*tiny*": {"latency": "low"}, "*/scaled.onnx": {"ttl": 5}}
    with onnx_dl.patch(ttl="90s", models=settings, host=host):
        assert InferenceSession(path, providers=CPU).ttl == 5
        vad = InferenceSession(str(tmp_path / "vad_tiny.onnx"), providers=CPU)
        assert (vad.ttl, vad._handle.lease.terms.latency) == (-1, "low")
        assert InferenceSession(scaled(), providers=CPU).ttl == 90


def test_a_model_that_is_to_stay(host: ModelHost, path: str, caplog: pytest.LogCaptureFixture) -> None:
    with (
        onnx_dl.patch(models={"scaled*": {"in_process": "yes"}}, host=host),
        caplog.at_level(logging.WARNING),
    ):
        session = InferenceSession(path, providers=CPU)
        assert session.run(*TWICE)[0][0, 0] == 2
        assert [status.isolated for status in host.snapshot().models] == [False]
        told = onnx_dl.unpatched_report()[-1]
        assert (told.model, told.reason) == (path, "its settings say so")
        assert __file__ in told.where
        assert str(told) in caplog.text
        assert InferenceSession(path, providers=CPU).unload()  # it has a proxy's methods


def test_options_that_cannot_travel(host: ModelHost, path: str) -> None:
    options = onnxruntime.SessionOptions()
    options.set_ep_context_data_read_func(lambda *args: None, 1)
    with onnx_dl.patch(host=host):
        InferenceSession(path, options, CPU)
        assert not models(host)
        assert "set_ep_context_data_read_func() was given" in onnx_dl.unpatched_report()[-1].reason


def test_a_native_session_is_told(host: ModelHost, path: str) -> None:
    with onnx_dl.patch(host=host):
        native = onnxruntime.capi.onnxruntime_pybind11_state
        native.InferenceSession(onnxruntime.SessionOptions(), path, True, False)
        assert "native class" in onnx_dl.unpatched_report()[-1].reason
        known = len(onnx_dl.unpatched_report())
        InferenceSession(path, providers=CPU).run_with_ort_values(
            ["twice"], {"x": onnxruntime.OrtValue.ortvalue_from_numpy(X)}
        )
        assert len(onnx_dl.unpatched_report()) == known  # what we make ourselves is not


def test_patches_nest(host: ModelHost, path: str) -> None:
    onnx_dl.patch(ttl=60, host=host)
    with onnx_dl.patch(ttl=5, host=host):
        assert InferenceSession(path, providers=CPU).ttl == 5
    assert InferenceSession(path, providers=CPU).ttl == 60
    onnx_dl.unpatch()
    onnx_dl.unpatch()  # nothing to take back


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"ttl": "soon"}, "soon"),
        ({"latency": "none"}, "none"),
        ({"models": {"*": {"colour": 1}}}, "no setting .'colour'."),
        ({"models": {"*": {"in_process": "maybe"}}}, "neither yes nor no"),
    ],
)
def test_settings_that_cannot_be(arguments: dict, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        onnx_dl.patch(**arguments)


def test_settings_on_a_command_line() -> None:
    found = parse_models(["vad*.onnx:ttl=-1", "C:/a.onnx:ttl=5,latency=low", "vad*.onnx:in_process=yes"])
    assert found == {
        "vad*.onnx": {"ttl": "-1", "in_process": "yes"},
        "C:/a.onnx": {"ttl": "5", "latency": "low"},
    }
    for text in ("vad", "vad:ttl", ":ttl=1", "vad:"):
        with pytest.raises(ConfigError, match="is no setting"):
            parse_models([text])


# --- onnx-dl run ------------------------------------------------------------------------------------------

PROGRAM = """
import sys
from onnxruntime import InferenceSession
import numpy as np

session = InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
print(__name__, sys.argv[2:], sys.path[0])
print(session.run(["twice"], {"x": np.ones((1, 1), np.float32)})[0][0, 0], session.ttl)
import onnx_dl
print(len(onnx_dl.default_host().snapshot().models), onnx_dl.unpatched_report())
raise SystemExit(3)
"""


NESTED = """
import sys
import onnx_dl
with onnx_dl.patch(ttl=5):
    from onnxruntime import InferenceSession
    print(InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"]).ttl)
print(InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"]).ttl)
onnx_dl.unpatch()
print(hasattr(InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"]), "ttl"))
print([finder for finder in sys.meta_path if "sitecustomize" in type(finder).__module__])
"""
FORGETFUL = """
import sys
if "-c" not in sys.orig_argv:  # the command itself
    import onnx_dl
    ours = onnx_dl.__path__[0].rpartition("/")[0]
    for name in [name for name in sys.modules if name.startswith("onnx_dl")]:
        del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if entry != ours]
    sys.meta_path[:] = [finder for finder in sys.meta_path if "onnx_dl" not in type(finder).__module__]
    sys.path[:] = [entry for entry in sys.path if not __import__("os").path.isdir(f"{entry}/onnx_dl")]
"""
STARTING = """
import multiprocessing, subprocess, sys
def is_patched(path):
    from onnxruntime import InferenceSession
    return hasattr(InferenceSession(path, providers=["CPUExecutionProvider"]), "ttl")
if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(1) as pool:
        print(pool.apply(is_patched, sys.argv[1:]))
    print(is_patched(sys.argv[1]), flush=True)
    subprocess.run([sys.executable, "-c", "import app, sys; print(app.is_patched(sys.argv[1]))", sys.argv[1]])
"""


def launched(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from onnx_dl.cli.main import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, "run", *arguments],
        cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_a_program(path: str, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    program = tmp_path / "code" / "app.py"
    program.write_text(PROGRAM)
    done = launched("--ttl", "60", "--set", "*.onnx:ttl=5m", str(program), path, "--ttl", "b", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.splitlines() == [f"__main__ ['--ttl', 'b'] {program.parent}", "2.0 300.0", "1 []"]


def test_a_module(path: str, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text(PROGRAM)
    done = launched("--ttl", "60", "-m", "package", path, "a", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.splitlines() == [f"__main__ ['a'] {tmp_path}", "2.0 60.0", "1 []"]


def test_a_program_under_a_limit(path: str, tmp_path: Path) -> None:
    program = tmp_path / "app.py"
    program.write_text(PROGRAM)
    done = launched("--memory-limit", "1MiB", str(program), path, cwd=tmp_path)
    assert done.returncode == 1
    assert "onnx_dl.errors.CapacityError: " in done.stderr and "the limit of 1.0 MB" in done.stderr
    done = launched("--memory-limit", "1GiB", str(program), path, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (3, "")
    done = launched("--memory-limit", "much", str(program), path, cwd=tmp_path)
    assert done.stderr.startswith("onnx-dl: 'much' is not a size")


def test_patches_of_the_program_itself(path: str, tmp_path: Path) -> None:
    """Ours is the first one, whether the program imports onnxruntime or our module before."""
    (tmp_path / "app.py").write_text(NESTED)
    done = launched("--ttl", "60", "app.py", path, cwd=tmp_path)
    assert (done.stderr, done.stdout.split()) == ("", ["5.0", "60.0", "False", "[]"])


def test_a_program_that_does_not_find_us(path: str, tmp_path: Path) -> None:
    """The hook finds us where the command did; the program's own packages come first."""
    (tmp_path / "sitecustomize.py").write_text(FORGETFUL)
    (tmp_path / "app.py").write_text(PROGRAM)
    searched = os.pathsep.join([str(tmp_path), str(Path(onnx_dl.__file__).parent.parent)])
    done = launched("--ttl", "60", "app.py", path, cwd=tmp_path, PYTHONPATH=searched)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.splitlines()[-2:] == ["2.0 60.0", "1 []"]


def test_what_the_program_starts_is_not_patched(path: str, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(STARTING)
    done = launched("app.py", path, cwd=tmp_path)
    assert (done.stderr, done.stdout.split()) == ("", ["True", "True", "False"])


def test_a_program_that_raises(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("import sys; print(sys.argv); raise ValueError('mine')")
    done = launched("app.py", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("ValueError: mine")


def test_nothing_to_run(tmp_path: Path) -> None:
    done = launched("nope.py", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.endswith("nope.py': [Errno 2] No such file or directory\n")
    done = launched("--set", "x", "nope.py", cwd=tmp_path)
    assert done.returncode == 1 and "'x' is no setting" in done.stderr
