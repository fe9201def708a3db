"""Conflicts between installed builds of onnxruntime, and the commands that repair them.  Pure functions.

All builds (onnxruntime, onnxruntime-gpu and others) write into one folder.  The build that was installed last
is *live*: the files are its own.  Uninstalling any build removes files of the others.  pip reports no error
in either case.

After the first part of each command here, something still imports, except if a third build is removed first.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final, NamedTuple

FLOOR: Final = "1.23.2"
"""The oldest onnxruntime that works.  Older ones lack session methods that workers call."""
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
"""The build that has a provider."""


class Build(NamedTuple):
    """Distribution name and version of a build; empty if not known."""

    name: str
    version: str


def release(version: str) -> tuple[int, ...]:
    """The first three numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def is_too_old(version: str) -> bool:
    """Returns whether the version is below the floor; false for an unknown one."""
    return bool(release(version)) and release(version) < release(FLOOR)


def missing(pip: str, system: str, machine: str) -> str:
    """The message without onnxruntime.  ``pip``: the installer's command; others as in ``_GPU_WHEELS``."""
    gpu = f', or "{GPU}>={FLOOR}" with an NVIDIA GPU' if (system, machine) in _GPU_WHEELS else ""
    return (
        "onnxruntime is not installed, and onnx-dl installs it only on request. Install it with: "
        f'{pip} install "{PLAIN}>={FLOOR}"{gpu}.'
    )


def damaged(pip: str, found: Mapping[str, str]) -> str:
    """The message if files of onnxruntime are missing."""
    listed = " and ".join(sorted(found)) or "onnxruntime"
    return (
        f"Files of {listed} are missing, as after one of two builds in this folder was uninstalled. "
        f"Repair it with: {repair(pip, found)}"
    )


def too_old(pip: str, found: Mapping[str, str], version: str) -> str:
    """The message for a version below the floor."""
    return (
        f"onnx-dl needs onnxruntime {FLOOR} or newer, and {version} is installed. "
        f'Update it with: {pip} install --upgrade "{target(found)}>={FLOOR}"'
    )


def clash(pip: str, found: Mapping[str, str], live: Build, asked: Collection[str] = ()) -> str:
    """The message for conflicting builds; empty if they do no harm.  ``asked``: names of providers."""
    if len(found) < 2:
        return ""
    listed = " and ".join(f"{name} {version}" for name, version in sorted(found.items()))
    others = found.keys() - {live.name}
    lacking = [name for name in asked if live.name and _BUILDS.get(name) in others]
    if lacking:
        harm = f"the files are those of {live.name}, which does not have {lacking[0]}"
    elif len(set(found.values())) > 1:
        harm = "their versions differ, so that what runs may be a mixture"
    else:
        return ""
    return f"{listed} are installed into one folder, and {harm}. Repair it with: {repair(pip, found, asked)}"


def repair(pip: str, found: Mapping[str, str], asked: Collection[str] = ()) -> str:
    """The command that makes one build complete and live.

    The plain build stays installed beside another one, at the same version: other packages may require it.
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
    """The command that makes the build for GPUs live."""
    return repair(pip, found) if GPU in found else f'{pip} install "{GPU}>={FLOOR}"'


def target(found: Mapping[str, str], asked: Collection[str] = ()) -> str:
    """The build that should be live: the one with a provider in ``asked``, else any but the plain one."""
    wanted = [_BUILDS[provider] for provider in asked if _BUILDS.get(provider) in found]
    return next(iter([*wanted, *sorted(found.keys() - {PLAIN}, key=lambda name: (name != GPU, name))]), PLAIN)
