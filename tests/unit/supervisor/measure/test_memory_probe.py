"""Memory by process id, without and with something that looks like a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from typing import IO

import pytest

from onnx_dl.core.status import Usage
from onnx_dl.supervisor.measure import memory_probe
from onnx_dl.supervisor.measure.memory_probe import Gpu, MemoryProbe, gpus
from onnx_dl.tensors import segment
from tests.support.waiting import eventually


def fake_nvml(used: dict[int, int | None]) -> types.ModuleType:
    """A pynvml of one GPU on which these processes hold so many bytes."""
    module = types.ModuleType("pynvml")
    module.NVMLError = RuntimeError
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetCount = lambda: 1
    module.nvmlDeviceGetHandleByIndex = lambda index: index
    module.nvmlDeviceGetComputeRunningProcesses = lambda gpu: [
        types.SimpleNamespace(pid=pid, usedGpuMemory=nbytes) for pid, nbytes in used.items()
    ]
    module.used, module.total = 1_000, 10_000
    module.nvmlDeviceGetMemoryInfo = lambda gpu: types.SimpleNamespace(used=module.used, total=module.total)
    return module


def test_this_process() -> None:
    usage = MemoryProbe().measure(os.getpid())
    assert usage.rss > usage.private > 1e6


def test_shared_memory_for_tensors_is_counted() -> None:
    before = MemoryProbe().measure(os.getpid()).shared
    fd = segment.create(1 << 20)
    mapping = segment.Mapping(fd, 1 << 20)
    assert mapping.address
    assert MemoryProbe().measure(os.getpid()).shared - before == 1 << 20
    del mapping
    assert MemoryProbe().measure(os.getpid()).shared == before


def test_a_process_that_is_gone_holds_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert MemoryProbe().measure(child.pid) == Usage()


def test_a_zombie_holds_nothing_and_weighs_nothing() -> None:
    """Between its end and its funeral a process has no memory, and what is read of it is no figure."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert MemoryProbe().measure(child.pid) == Usage()
    assert MemoryProbe().weigh(child.pid, 0) == 0
    child.wait()
    assert MemoryProbe().weigh(child.pid, 0) == 0


def test_weighing_is_exact_only_where_it_matters() -> None:
    """Resident bytes count what processes share in full, so they are never less."""
    rough, exact = MemoryProbe().weigh(os.getpid(), 1 << 50), MemoryProbe().weigh(os.getpid(), 0)
    assert 1e6 < exact <= rough * 1.01


def test_no_driver_means_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_nvml({os.getpid(): 7})

    def no_driver() -> None:
        raise RuntimeError("NVML Shared Library Not Found")

    module.nvmlInit = no_driver
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert MemoryProbe().measure(os.getpid()).gpu is None


@pytest.mark.parametrize(("told", "expected"), [(7_000_000, 7_000_000), (None, None)])
def test_a_gpu(monkeypatch: pytest.MonkeyPatch, told: int | None, expected: int | None) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml({os.getpid(): told, 1: 99}))
    assert MemoryProbe().measure(os.getpid()).gpu == expected


def test_a_gpu_that_does_not_tell_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What became less during the load is taken for it, and said to be an estimate."""
    module = fake_nvml({})
    monkeypatch.setitem(sys.modules, "pynvml", module)
    probe, me = MemoryProbe(), os.getpid()
    assert probe.gpu_total() == 10_000
    probe.begin(me)
    assert probe.measure(me).gpu is None
    module.used = 4_000
    probe.loaded(me)
    module.used = 9_000  # somebody else
    usage = probe.measure(me)
    assert (usage.gpu, usage.gpu_estimated) == (3_000, True)
    probe.end(me)
    assert probe.measure(me).gpu is None


def test_a_figure_of_the_driver_is_no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_nvml({os.getpid(): 7})
    monkeypatch.setitem(sys.modules, "pynvml", module)
    probe = MemoryProbe()
    probe.begin(os.getpid())
    module.used = 4_000
    probe.loaded(os.getpid())
    usage = probe.measure(os.getpid())
    assert (usage.gpu, usage.gpu_estimated) == (7, False)
    assert probe.gpu_bytes(os.getpid()) == 7 and probe.gpu_bytes(1) is None


def test_without_a_gpu_there_is_nothing_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_nvml({})
    module.nvmlDeviceGetCount = lambda: 0
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert MemoryProbe().gpu_total() is None


def test_gpus_by_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML numbers all GPUs, CUDA those that the host sees."""
    module, me = fake_nvml({}), os.getpid()
    module.nvmlDeviceGetCount = lambda: 3
    module.nvmlDeviceGetUUID = lambda gpu: f"GPU-{gpu}"
    module.nvmlDeviceGetName = lambda gpu: "H100"
    held = {0: 5, 1: 70, 2: 800}
    module.nvmlDeviceGetComputeRunningProcesses = lambda gpu: [
        types.SimpleNamespace(pid=me, usedGpuMemory=held[gpu])
    ]
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    probe = MemoryProbe()
    assert probe.host_gpus().sizes() == {0: 10_000, 1: 10_000}
    usage = probe.measure(me)
    assert (usage.gpu, usage.gpus) == (875, {0: 800, 1: 5})


def test_an_estimate_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    module, me = fake_nvml({}), os.getpid()
    module.nvmlDeviceGetCount = lambda: 2
    module.nvmlDeviceGetUUID = lambda gpu: f"GPU-{gpu}"
    module.nvmlDeviceGetName = lambda gpu: "H100"
    used = [100, 200]
    module.nvmlDeviceGetMemoryInfo = lambda gpu: types.SimpleNamespace(used=used[gpu], total=10_000)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    probe = MemoryProbe()
    probe.begin(me)
    used[:] = [90, 900]  # another process has given some back
    probe.loaded(me)
    usage = probe.measure(me)
    assert (usage.gpu, usage.gpus, usage.gpu_estimated) == (690, {1: 700}, True)


PEAKS = """
import sys
for size in (80, 30):
    sys.stdin.readline()
    block = bytearray(size << 20)
    del block
    print(flush=True)
sys.stdin.readline()
"""


def test_the_peak_since_the_mark_was_set_back() -> None:
    """Of another process, as the supervisor reads it."""
    child = subprocess.Popen(
        [sys.executable, "-c", PEAKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    probe = MemoryProbe()

    def excess() -> float:
        """MB by which the peak exceeds what there is, after the next block."""
        child.stdin.write("\n")
        child.stdin.flush()
        child.stdout.readline()
        usage = probe.measure(child.pid)
        return (usage.peak - usage.pss) / 2**20

    with child:
        assert child.stdin is not None and child.stdout is not None
        assert 75 < excess() < 90
        probe.forget_peak(child.pid)
        assert probe.measure(child.pid).peak - probe.measure(child.pid).pss < 5 << 20
        assert 25 < excess() < 40
    probe.forget_peak(child.pid)  # it is gone: nothing happens


def test_a_forked_child_does_not_inherit_the_peak() -> None:
    """Workers are forked from a template whose imports took more than what is left of them."""
    code = "import os, sys; block = bytearray(200 << 20); del block; pid = os.fork(); print(pid, flush=True)"
    code += " if pid else None; sys.stdin.readline(); pid and os.waitpid(pid, 0)"
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        usage = MemoryProbe().measure(int(parent.stdout.readline()))
    assert usage.pss > 0 and usage.peak - usage.pss < 5 << 20


INHERITS = """
import os, sys
block = bytearray(b"x") * (60 << 20)
pid = os.fork()
if pid:
    print(pid, flush=True)
else:
    mine = bytearray(b"x") * (30 << 20)
sys.stdin.readline()
if pid:
    os.waitpid(pid, 0)
"""


def test_what_a_fork_left_to_a_child_is_not_its_own() -> None:
    """Half of the pages of each: they are parent's and child's.  What the child made is its own."""
    parent = subprocess.Popen(
        [sys.executable, "-c", INHERITS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        child, probe = int(parent.stdout.readline()), MemoryProbe()
        eventually(lambda: probe.measure(child).private > 30 << 20, "the child has its own block")
        usage, weight = probe.measure(child), probe.weigh(child, 0)
    assert 30 << 20 <= usage.inherited < 36 << 20
    assert usage.private <= usage.pss - usage.inherited < 36 << 20
    assert weight < 36 << 20


def test_a_kernel_without_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil's figures then, and nothing is inherited."""

    def no_sums(path: str, *args: str) -> IO[str]:
        if path.endswith("smaps_rollup"):
            raise FileNotFoundError(path)
        return open(path, *args)

    exact = MemoryProbe().measure(os.getpid())
    monkeypatch.setattr(memory_probe, "open", no_sums, raising=False)
    usage = MemoryProbe().measure(os.getpid())
    assert usage.inherited == 0 and usage.rss > usage.pss >= usage.private > 1e6
    assert usage.pss == pytest.approx(exact.pss, rel=0.1)
    assert MemoryProbe().measure(1 << 30) == Usage()


def test_gpus_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_nvml({})
    module.nvmlSystemGetDriverVersion = lambda: "550.1"
    module.nvmlDeviceGetName = lambda gpu: f"GPU {gpu}"
    module.nvmlDeviceGetMemoryInfo = lambda gpu: types.SimpleNamespace(total=8_000_000)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert gpus() == [Gpu("GPU 0", 8_000_000, "550.1")]
    module.nvmlDeviceGetCount = lambda: 0
    assert gpus() == []


def test_why_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_nvml({})

    def no_driver() -> None:
        raise RuntimeError("NVML Shared Library Not Found")

    module.nvmlInit = no_driver
    monkeypatch.setitem(sys.modules, "pynvml", module)
    with pytest.raises(OSError, match="NVML Shared Library Not Found"):
        gpus()
