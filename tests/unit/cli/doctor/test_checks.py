"""Each check of ``onnx-dl doctor``, from what may be found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from onnx_dl.cli.doctor import checks, collect
from onnx_dl.cli.doctor.checks import Finding, Mark
from onnx_dl.cli.doctor.trials import TrialResult, children_of, parse_output
from onnx_dl.core.settings import Settings
from onnx_dl.protocol.codec import PROTOCOL_VERSION
from onnx_dl.supervisor.measure.memory_probe import Gpu
from onnx_dl.transport.running_hosts import RunningHost

HERE = {"version": "1.31.1", "build": "onnxruntime-gpu", "folder": "/x/onnxruntime", "providers": ["A"]}
H100 = Gpu("NVIDIA H100", 80_000_000_000, "550.1")
CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"


def gave(mark: Mark, found: Finding, *words: str) -> None:
    """The finding has that mark and these words; anything but ok says what to do."""
    assert found.mark is mark, found
    assert [word for word in words if word not in found.found + found.advice] == [], found
    assert found.advice or mark is Mark.OK


@pytest.mark.parametrize(
    ("version", "mark"),
    [((3, 11, 9), Mark.OK), ((3, 12, 0), Mark.WARNING), ((3, 12, 2), Mark.WARNING), ((3, 12, 3), Mark.OK)],
)
def test_python(version: tuple[int, int, int], mark: Mark) -> None:
    gave(mark, checks.python_version(version), ".".join(map(str, version)))


@pytest.mark.parametrize(
    ("system", "release", "mark"),
    [
        ("Linux", "5.3.0-generic", Mark.OK), ("Linux", "6.18.44", Mark.OK), ("Linux", "5.2.99", Mark.PROBLEM),
        ("Linux", "4.18.0-553.el8", Mark.PROBLEM), ("Darwin", "23.1.0", Mark.PROBLEM),
    ],
)  # fmt: skip
def test_kernel(system: str, release: str, mark: Mark) -> None:
    gave(mark, checks.kernel(system, release), release)


def test_settings() -> None:
    gave(Mark.OK, checks.environment("", {}))
    complaint = "ONNX_DL_LANE='x' is not one of socket, zmq."
    gave(Mark.PROBLEM, checks.environment(complaint, {}), "ONNX_DL_LANE")
    gave(
        Mark.WARNING, checks.environment("", {"ONNX_DL_Z": "", "ONNX_DL_LAN": "ONNX_DL_LANE"}), "Z,", "LANE?"
    )


def test_variables_that_nothing_reads() -> None:
    names = ("ONNX_DL_MEMORY_LIMT", "ONNX_DL_ZEBRA", "ONNX_DL_LANE", "ONNX_DL_RUNTIME_DIR", "HOME")
    assert collect.unknown_variables(dict.fromkeys(names, "x")) == {
        "ONNX_DL_MEMORY_LIMT": "ONNX_DL_MEMORY_LIMIT",
        "ONNX_DL_ZEBRA": "",
    }


def test_a_folder_for_shared_hosts() -> None:
    gave(Mark.OK, checks.shared_hosts("", wanted=True))
    gave(Mark.PROBLEM, checks.shared_hosts("/x: is open to other users", wanted=True), "/x")
    gave(Mark.WARNING, checks.shared_hosts("/x: is open to other users", wanted=False), "/x")


def test_shared_hosts_that_run() -> None:
    ours = RunningHost(name="a", protocol=PROTOCOL_VERSION, pid=2, started=2.0, package="1.0")
    later = RunningHost(name="a", protocol=PROTOCOL_VERSION + 1, pid=3, started=3.0, package="2.0")
    before = RunningHost(name="a", protocol=None, pid=1, started=1.0)
    assert checks.host(ours, [ours]).check == "host a"
    gave(
        Mark.OK, checks.host(ours, [ours]), f"onnx-dl 1.0, protocol version {PROTOCOL_VERSION}, pid 2, since "
    )
    gave(Mark.OK, checks.host(ours, [ours, later]), "It ends when its clients have gone")
    gave(
        Mark.WARNING,
        checks.host(later, [ours, later]),
        "onnx-dl 2.0, ",
        "pid 3",
        "cannot connect to it",
        "It stays",
    )
    gave(
        Mark.WARNING, checks.host(before, [before, ours]), "4 or older, pid 1", "stop --host a --all-versions"
    )


def test_one_build() -> None:
    gave(
        Mark.OK,
        checks.packages({"onnxruntime-gpu": "1.31.1"}, TrialResult(HERE)),
        "onnxruntime-gpu 1.31.1 in /x",
    )


def test_two_builds_and_whose_files_are_live() -> None:
    found = checks.packages({"onnxruntime": "1.20.0", "onnxruntime-gpu": "1.31.1"}, TrialResult(HERE))
    gave(Mark.WARNING, found, "onnxruntime 1.20.0 and onnxruntime-gpu 1.31.1", "onnxruntime-gpu==1.31.1")
    assert found.found.endswith("the files are those of onnxruntime-gpu 1.31.1")


def test_files_of_another_version() -> None:
    found = checks.packages({"onnxruntime": "1.20.0"}, TrialResult(HERE))
    gave(Mark.WARNING, found, "pip install --force-reinstall --no-deps onnxruntime")


@pytest.mark.parametrize(
    ("builds", "words"),
    [
        ({}, "pip install"),
        ({"onnxruntime": "1.20.0"}, "--force-reinstall"),
        ({"onnxruntime": "1.20.0", "onnxruntime-gpu": "1.31.1"}, "onnxruntime-gpu==1.31.1"),
    ],
)
def test_a_build_that_cannot_be_imported(builds: dict[str, str], words: str) -> None:
    broken = TrialResult(None, "ended with exit code 1", "Traceback\nAttributeError: no attribute 'x'\n")
    gave(Mark.PROBLEM, checks.packages(builds, broken), "AttributeError: no attribute 'x'", words)


def test_a_provider_that_works() -> None:
    gave(
        Mark.OK,
        checks.provider(CUDA, TrialResult({"providers": [CUDA, CPU], "computes": True}), [H100]),
        "works",
    )


LOG = (
    "\x1b[1;31m2026-11-21 10:37:32.163 [E:onnxruntime:Default, provider_bridge_ort.cc:2458 operator()] "
    "/o/x.cc:2043 Get() [ONNXRuntimeError] : 1 : FAIL : Failed to load library "
    "/v/libonnxruntime_providers_cuda.so with error: "
    "libcublasLt.so.13: cannot open shared object file: No such file or directory\n\x1b[m\n"
)  # fmt: skip


def test_a_provider_that_falls_back() -> None:
    tried = TrialResult({"providers": [CPU], "computes": True}, "", LOG)
    found = checks.provider(CUDA, tried, [H100])
    gave(Mark.WARNING, found, "falls back", "libcublasLt.so.13: cannot open", "Install its libraries")
    gave(Mark.WARNING, checks.provider(CUDA, tried, []), "Nothing to do without a device")


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        (LOG, "libcublasLt.so.13: cannot open shared object file: No such file or directory"),
        ("\x1b[0m[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : no kernel image\x1b[m\n", "no kernel image"),
        ("\n  something else\nmore\n", "something else"),
        ("", "no reason given"),
    ],
)
def test_a_reason(stderr: str, expected: str) -> None:
    assert checks.reason(stderr) == expected


def test_a_provider_that_ends_its_process_or_computes_nonsense() -> None:
    crashed = TrialResult(None, "was killed by SIGSEGV", "")
    gave(Mark.WARNING, checks.provider(CUDA, crashed, [H100]), "was killed by SIGSEGV")
    gave(Mark.PROBLEM, checks.provider(CPU, crashed, []), "was killed by SIGSEGV")
    wrong = TrialResult({"providers": [CUDA], "computes": False})
    gave(Mark.PROBLEM, checks.provider(CUDA, wrong, [H100]), "|-2| is not 2")


def test_gpus() -> None:
    gave(
        Mark.OK,
        checks.gpu([], "NVML Shared Library Not Found", [CPU], "mend"),
        "none: NVML Shared Library Not Found",
    )
    gave(Mark.OK, checks.gpu([H100], "", [CUDA, CPU], "mend"), "NVIDIA H100, 80.0 GB, driver 550.1")
    gave(Mark.WARNING, checks.gpu([H100], "", [CPU], "mend"), "cannot use it", "mend")


def test_processors() -> None:
    gave(Mark.OK, checks.processors(2, 8), "2 of 8")
    gave(Mark.OK, checks.processors(8, 8), "all 8")


def test_memory() -> None:
    gave(Mark.OK, checks.memory(10**9, 4 * 10**9, 2), "1000.0 MB of 4000.0 MB, by cgroup v2")
    gave(Mark.OK, checks.memory(10**9, 10**9, 1, 8 * 10**8), "all 1000.0 MB", "host may take 800.0 MB")
    gave(Mark.WARNING, checks.memory(None, None, None), "ONNX_DL_MEMORY_LIMIT")


def test_sandbox() -> None:
    gave(Mark.OK, checks.sandbox(7, ""), "Landlock version 7, seccomp")
    gave(Mark.OK, checks.sandbox(0, ""), "no Landlock", "sandbox=True", "lsm=")
    gave(
        Mark.OK, checks.sandbox(7, "Operation not permitted"), "no seccomp filters (Operation not permitted)"
    )


def test_shared_memory() -> None:
    gave(Mark.OK, checks.shared_memory(64_000_000), "64.0 MB", "memfds")
    gave(Mark.OK, checks.shared_memory(None), "is missing", "memfds")


@pytest.mark.parametrize(
    ("version", "environ", "mark"),
    [
        ("1.28.9", {}, Mark.OK), (None, {}, Mark.OK), ("1.29.0", {}, Mark.WARNING), ("2.0", {}, Mark.WARNING),
        ("1.31.1", {"ORT_DISABLE_TELEMETRY": "0"}, Mark.WARNING),
        ("1.31.1", {"ORT_DISABLE_TELEMETRY": "1"}, Mark.OK),
    ],
)  # fmt: skip
def test_telemetry(version: str | None, environ: dict[str, str], mark: Mark) -> None:
    gave(mark, checks.telemetry(version, environ))


@pytest.mark.parametrize(
    ("mode", "forked", "mark", "words"),
    [
        ("fork", True, Mark.OK, "forked"),
        ("exec", False, Mark.OK, "ONNX_DL_START=exec"),
        ("fork", False, Mark.WARNING, "more than one thread"),
    ],
)
def test_how_workers_start(mode: str, forked: bool, mark: Mark, words: str) -> None:
    said: dict[str, Any] = {"forked": forked, "seconds": 0.5, "memory_limit": None}
    gave(mark, checks.start(mode, TrialResult(said)), words, "0.50 s")


def test_workers_that_do_not_start() -> None:
    gave(
        Mark.PROBLEM,
        checks.start("fork", TrialResult(None, "gave no answer within 9 s")),
        "no answer within 9 s",
    )


def test_load_cache(tmp_path: Path) -> None:
    gave(Mark.OK, checks.load_cache(Settings(cache="off"), tmp_path), "off")
    gave(Mark.OK, checks.load_cache(Settings(), tmp_path / "later" / "made"), "0.0 MB of 21.5 GB")
    assert list(tmp_path.iterdir()) == []
    gave(Mark.WARNING, checks.load_cache(Settings(), Path("/proc/nothing")), "ONNX_DL_CACHE_DIR")
    (tmp_path / "file").touch()
    gave(Mark.WARNING, checks.load_cache(Settings(), tmp_path / "file" / "below"), "cannot be written")


@pytest.mark.parametrize(
    ("code", "stdout", "expected"),
    [
        (0, 'native words\n{"a": 1}\n', TrialResult({"a": 1}, "", "e")),
        (0, "", TrialResult(None, "gave no answer", "e")),
        (0, "words\n", TrialResult(None, "gave no answer", "e")),
        (3, '{"a": 1}', TrialResult(None, "ended with exit code 3", "e")),
        (-11, "", TrialResult(None, "was killed by SIGSEGV", "e")),
        (-35, "", TrialResult(None, "was killed by signal 35", "e")),
    ],
)
def test_answers(code: int, stdout: str, expected: TrialResult) -> None:
    assert parse_output(code, stdout, "e") == expected


def test_children(tmp_path: Path) -> None:
    for pid, parent in ((7, 3), (8, 33), (9, 3)):
        (tmp_path / str(pid)).mkdir()
        status = f"Name:\tx\nPid:\t{pid}\nPPid:\t{parent}\nTracerPid:\t0\n"
        (tmp_path / str(pid) / "status").write_text(status)
    (tmp_path / "10").mkdir()  # it has just ended
    assert children_of(3, tmp_path) == {7, 9}
