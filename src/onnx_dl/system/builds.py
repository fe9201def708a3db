"""Which builds of onnxruntime are beside each other, and which command mends that.

Pure: what is installed is :mod:`onnx_dl.system.installation`'s to find.  All builds (onnxruntime, onnxruntime-gpu
and others) write into one folder.  The one that was written last is live; uninstalling any of them takes
files of the others along.  pip finds nothing wrong with either.

No command here leaves nothing that imports if only its first part is carried out, except where a third build
has to go first.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final, NamedTuple

FLOOR: Final = "1.23.2"
"""The oldest onnxruntime that works.  Older ones lack methods of sessions that workers ask for."""
PLAIN: Final = "onnxruntime"
GPU: Final = "onnxruntime-gpu"
_GPU_WHEELS: Final = frozenset({("linux", "x86_64"), ("win32", "AMD64")})
"""``sys.platform`` and ``platform.machine()`` for which there are wheels of onnxruntime-gpu."""
_BUILDS: Final = {
    "CUDAExecutionProvider": GPU,
    "TensorrtExecutionProvider": GPU,
    "NvTensorRTRTXExecutionProvider": "onnxruntime-trt-rtx",
    "DmlExecutionProvider": "onnxruntime-directml",
    "OpenVINOExecutionProvider": "onnxruntime-openvino",
    "ROCMExecutionProvider": "onnxruntime-rocm",
    "MIGraphXExecutionProvider": "onnxruntime-migraphx",
    "QNNExecutionProvider": "onnxruntime-qnn",
    "CANNExecutionProvider": "onnxruntime-cann",
    "WebGpuExecutionProvider": "onnxruntime-webgpu",
}
"""Which build brings a provider."""


class Build(NamedTuple):
    """A build by its distribution's name, and its version; empty where it is not known."""

    name: str
    version: str


def release(version: str) -> tuple[int, ...]:
    """The first three numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def is_too_old(version: str) -> bool:
    """Whether it is below the floor; one that is not known is not."""
    return bool(release(version)) and release(version) < release(FLOOR)


def missing(pip: str, system: str, machine: str) -> str:
    """What to do without onnxruntime.  ``pip``: how it is called; the others as in ``_GPU_WHEELS``."""
    gpu = f', or "{GPU}>={FLOOR}" with an NVIDIA GPU' if (system, machine) in _GPU_WHEELS else ""
    return (
        "onnxruntime is not installed, and onnx-dl brings none unless it is told to. Install it with: "
        f'{pip} install "{PLAIN}>={FLOOR}"{gpu}.'
    )


def damaged(pip: str, found: Mapping[str, str]) -> str:
    """What to do where files of onnxruntime are gone."""
    listed = " and ".join(sorted(found)) or "onnxruntime"
    return (
        f"Files of {listed} are missing, as after one of two builds in this folder was uninstalled. "
        f"Mend it with: {mend(pip, found)}"
    )


def too_old(pip: str, found: Mapping[str, str], version: str) -> str:
    """What to do below the floor."""
    return (
        f"onnx-dl needs onnxruntime {FLOOR} or newer, and {version} is installed. "
        f'Update it with: {pip} install --upgrade "{target(found)}>={FLOOR}"'
    )


def clash(pip: str, found: Mapping[str, str], live: Build, asked: Collection[str] = ()) -> str:
    """What to say of several builds; empty where they do no harm.  ``asked``: names of providers."""
    if len(found) < 2:
        return ""
    listed = " and ".join(f"{name} {version}" for name, version in sorted(found.items()))
    others = found.keys() - {live.name}
    lacking = [name for name in asked if live.name and _BUILDS.get(name) in others]
    if lacking:
        harm = f"the files are those of {live.name}, which has no {lacking[0]}"
    elif len(set(found.values())) > 1:
        harm = "their versions differ, so that what runs may be a mixture"
    else:
        return ""
    return f"{listed} are installed into one folder, and {harm}. Mend it with: {mend(pip, found, asked)}"


def mend(pip: str, found: Mapping[str, str], asked: Collection[str] = ()) -> str:
    """The command after which one build is whole and live, whichever was before.

    The plain build stays installed beside another one, at the same version, because packages may need it.
    """
    if not found:
        return f'{pip} install "{PLAIN}>={FLOOR}"'
    name = target(found, asked)
    version = found[name]
    again = f"{pip} install --force-reinstall --no-deps"
    others = sorted(found.keys() - {name, PLAIN})
    steps = [f"{pip} uninstall -y {' '.join(others)}"] if others else []
    if found.get(PLAIN, version) != version:
        steps.append(f"{again} {PLAIN}=={version}")
    return " && ".join([*steps, f"{again} {name}=={version}"])


def for_gpus(pip: str, found: Mapping[str, str]) -> str:
    """The command after which the build for GPUs is live."""
    return mend(pip, found) if GPU in found else f'{pip} install "{GPU}>={FLOOR}"'


def target(found: Mapping[str, str], asked: Collection[str] = ()) -> str:
    """The build that should be live: that of a provider asked for, else any but the plain one."""
    wanted = [_BUILDS[provider] for provider in asked if _BUILDS.get(provider) in found]
    return next(iter([*wanted, *sorted(found.keys() - {PLAIN}, key=lambda name: (name != GPU, name))]), PLAIN)
