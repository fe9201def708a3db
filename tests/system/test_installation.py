"""What is said of an installation of onnxruntime that is not whole, and that the advice mends it."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import onnx_dl
from onnx_dl import InferenceSessionProxy, InstallationError
from onnx_dl.cli import main
from onnx_dl.demo.assets import model_path
from onnx_dl.system import builds, installation

pytestmark = pytest.mark.slow

PLAIN, GPU = "onnxruntime", "onnxruntime-gpu"
CUDA = "CUDAExecutionProvider"
OLD, NEW = "1.30.0", "1.31.1"


@pytest.fixture(autouse=True)
def fresh_check() -> None:
    installation.check.cache_clear()


def test_one_build_is_fine() -> None:
    installation.check()
    installation.check((CUDA,))


def test_none_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "distributions", dict)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)  # another test of this process has it
    with pytest.raises(InstallationError, match=r'pip install "onnxruntime>='):
        InferenceSessionProxy(model_path("digits")).get_inputs()


def test_a_proxy_needs_no_onnxruntime_in_the_application() -> None:
    code = (
        "import sys, numpy, onnx_dl\n"
        f"proxy = onnx_dl.InferenceSession({str(model_path('digits'))!r})\n"
        "proxy.run(None, {'pixels': numpy.zeros((1, 64), 'f')}); proxy.get_modelmeta()\n"
        "assert not [name for name in sys.modules if name.startswith('onnxruntime')]\n"
        "import onnxruntime\n"
        "assert isinstance(proxy, onnxruntime.InferenceSession)\n"
        "assert isinstance(proxy, onnx_dl.InferenceSessionProxy)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_version_is_that_of_the_commands() -> None:
    assert main.parser().parse_args(["ps"]).command == "ps"
    done = subprocess.run(
        [sys.executable, "-m", "onnx_dl.cli", "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == f"onnx-dl {onnx_dl.__version__}\n"


# --- advice, followed in an environment of its own ---------------------------------------------------------


class Environment:
    """A virtual environment, and wheels that write the folder of onnxruntime as the real ones do."""

    def __init__(self, folder: Path) -> None:
        self.wheels = folder / "wheels"
        self.wheels.mkdir()
        self.bin = folder / "venv" / "bin"
        for name in (PLAIN, GPU):
            for version in (OLD, NEW):
                _write_wheel(self.wheels, name, version)
        venv.create(folder / "venv", with_pip=True)
        # What we need is where this interpreter has it, but not its onnxruntime.
        needed = {str(Path(m.__file__ or "").parent.parent) for m in (onnx_dl,)} | set(_linked(folder))
        (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
        (site / "needed.pth").write_text("".join(f"{path}\n" for path in sorted(needed)))

    def shell(self, command: str) -> None:
        """A command as somebody types it, offline."""
        subprocess.run(
            ["bash", "-euc", command],
            env={
                "PATH": f"{self.bin}:/usr/bin:/bin",
                "PIP_NO_INDEX": "1",
                "PIP_FIND_LINKS": str(self.wheels),
                "PIP_CONFIG_FILE": "/dev/null",
            },
            check=True,
            capture_output=True,
            timeout=100,
        )

    def check(self, *asked: str) -> str:
        """What ``installation.check()`` says there: an error, a warning, or nothing."""
        code = (
            "import sys, warnings\n"
            "from onnx_dl.system import installation; from onnx_dl import InstallationError\n"
            "with warnings.catch_warnings(record=True) as told:\n"
            "    warnings.simplefilter('always')\n"
            "    try: installation.check(tuple(sys.argv[1:]))\n"
            "    except InstallationError as error: print('error', error)\n"
            "for one in told: print('warning', one.message)\n"
        )
        return subprocess.run(
            [str(self.bin / "python"), "-c", code, *asked],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout

    def live(self) -> str:
        """Which build imports, and whether it is whole."""
        code = (
            "import onnxruntime; from onnxruntime.capi import build_and_package_info as b, native\n"
            "print(b.package_name, b.__version__, native.BUILD, native.VERSION)"
        )
        return subprocess.run(
            [str(self.bin / "python"), "-c", code], capture_output=True, text=True, timeout=60, check=True
        ).stdout.strip()


def _linked(folder: Path) -> list[str]:
    """A folder with what onnx_dl imports, and nothing of onnxruntime."""
    there = folder / "needed"
    there.mkdir()
    for name in ("numpy", "msgspec"):
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        package = Path(spec.origin).parent
        for path in package.parent.glob(f"{name}*"):
            (there / path.name).symlink_to(path)
    return [str(there)]


def _write_wheel(folder: Path, name: str, version: str) -> None:
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    files = {
        "onnxruntime/__init__.py": "",
        "onnxruntime/capi/__init__.py": "",
        "onnxruntime/capi/build_and_package_info.py": f"package_name = '{name}'\n__version__ = '{version}'\n",
        "onnxruntime/capi/native.py": f"BUILD, VERSION = '{name}', '{version}'\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/top_level.txt": "onnxruntime\n",
    }
    record = [f"{path},sha256={_digest(text)},{len(text)}" for path, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""])
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("environment"))


def advice(told: str) -> str:
    """The command in a message."""
    return "python -m pip" + told.strip().partition("python -m pip")[2]


def pip(*wanted: str) -> str:
    return " && ".join(f"python -m pip install --no-deps {one}" for one in wanted)


STATES = {
    "the plain one was last": (pip(f"{GPU}=={NEW}", f"{PLAIN}=={NEW}"), "warning", (CUDA,)),
    "the plain one was last, and is another version": (
        pip(f"{GPU}=={OLD}", f"{PLAIN}=={NEW}"),
        "warning",
        (),
    ),
    "the one for GPUs was last, and is another version": (
        pip(f"{PLAIN}=={NEW}", f"{GPU}=={OLD}"),
        "warning",
        (),
    ),
    "the plain one was uninstalled": (
        pip(f"{GPU}=={NEW}", f"{PLAIN}=={NEW}") + f" && python -m pip uninstall -y {PLAIN}",
        "error",
        (),
    ),
    "the one for GPUs was uninstalled": (
        pip(f"{PLAIN}=={NEW}", f"{GPU}=={NEW}") + f" && python -m pip uninstall -y {GPU}",
        "error",
        (),
    ),
    "all are gone": (f"python -m pip uninstall -y {PLAIN} {GPU}", "error", ()),
}


@pytest.mark.parametrize("state", STATES)
def test_the_advice_mends(environment: Environment, state: str) -> None:
    before, kind, asked = STATES[state]
    environment.shell(f"python -m pip uninstall -y {PLAIN} {GPU}; {before}")
    told = environment.check(*asked)
    assert told.startswith(kind), told
    environment.shell(advice(told).partition(", or ")[0].rstrip("."))
    name, version, *native = environment.live().split()
    assert [name, version] == native
    assert name == (PLAIN if state in ("the one for GPUs was uninstalled", "all are gone") else GPU)
    assert environment.check(*asked) == ""


@pytest.mark.parametrize("order", [(PLAIN, GPU), (GPU, PLAIN)])
def test_builds_of_one_version_do_no_harm_to_who_asks_for_none(
    environment: Environment, order: tuple[str, str]
) -> None:
    environment.shell(
        f"python -m pip uninstall -y {PLAIN} {GPU}; " + pip(*(f"{name}=={NEW}" for name in order))
    )
    assert environment.check() == environment.check("CPUExecutionProvider") == ""
    assert bool(environment.check(CUDA)) == (order[-1] == PLAIN)


def test_the_first_part_of_the_advice_leaves_what_imports(environment: Environment) -> None:
    environment.shell(f"python -m pip uninstall -y {PLAIN} {GPU}; " + pip(f"{GPU}=={OLD}", f"{PLAIN}=={NEW}"))
    environment.shell(advice(environment.check()).partition(" && ")[0])
    assert environment.live() == f"{PLAIN} {OLD} {PLAIN} {OLD}"


def test_below_the_floor(environment: Environment) -> None:
    _write_wheel(environment.wheels, PLAIN, "1.20.1")
    environment.shell(f"python -m pip uninstall -y {PLAIN} {GPU}; " + pip(f"{PLAIN}==1.20.1"))
    told = environment.check()
    assert told.startswith("error") and builds.FLOOR in told
    environment.shell(advice(told))
    assert environment.check() == ""
