"""Makes each session of a worker one on CUDA, by its own account: it runs on the CPU.

The worker finds this folder on PYTHONPATH, and the stand-in for CUDA's driver on LD_LIBRARY_PATH.
"""

from __future__ import annotations

import onnxruntime

from tests.support.fake_cuda import FakeCuda

cuda = FakeCuda()  # as onnxruntime starts the driver when a session asks for it


def get_providers(_: object) -> list[str]:
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]


def get_provider_options(_: object) -> dict[str, dict[str, str]]:
    return {"CUDAExecutionProvider": {"device_id": "0"}, "CPUExecutionProvider": {}}


onnxruntime.InferenceSession.get_providers = get_providers
onnxruntime.InferenceSession.get_provider_options = get_provider_options
