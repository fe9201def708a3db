"""GPUs that models use: which of them, and by which numbers."""

from __future__ import annotations

import pytest

from onnx_dl.core.environment import Environment
from onnx_dl.core.spec import ModelSpec, group_spec
from onnx_dl.supervisor.policy.gpu_devices import HostGpus, MachineGpu, uses_gpu
from tests.support.builders import spec

TWO = [MachineGpu("GPU-aa", "H100", 80), MachineGpu("GPU-bb", "H100", 80)]
FOUR = [*TWO, MachineGpu("GPU-cc1", "H100", 80), MachineGpu("GPU-cc2", "H100", 40)]
MIXED = [MachineGpu("GPU-aa", "A10", 24), MachineGpu("GPU-bb", "H100", 80)]


def cuda(device: object = None, listed: str | None = "", **more: object) -> ModelSpec:
    """A model on this device; ``listed``: its own list of devices, None: none, empty: the host's."""
    environment = Environment({} if listed == "" else {"CUDA_VISIBLE_DEVICES": listed})
    entry = ["CUDAExecutionProvider", {} if device is None else {"device_id": device}]
    return spec(providers=[entry, "CPUExecutionProvider"], environment=environment, **more)


@pytest.mark.parametrize(
    ("providers", "expected"),
    [
        (None, False),
        ([], False),
        (["CPUExecutionProvider"], False),
        (["CUDAExecutionProvider", "CPUExecutionProvider"], True),
        ([("CUDAExecutionProvider", {"device_id": 1})], True),
        ([["TensorrtExecutionProvider", {}], "CPUExecutionProvider"], True),
        (["OpenVINOExecutionProvider", []], False),
    ],
)
def test_who_uses_a_gpu(providers: list | None, expected: bool) -> None:
    assert uses_gpu(spec(providers=providers)) is expected


def test_a_group_uses_what_its_members_do() -> None:
    cpu, cuda = spec("a", group="g"), spec("b", group="g", providers=["CUDAExecutionProvider"])
    assert not uses_gpu(group_spec([cpu])) and uses_gpu(group_spec([cpu, cuda]))


@pytest.mark.parametrize(
    ("device", "expected"), [(None, 0), ("1", 1), (3, 3), ("?", 0), (-1, 0), (10**20, 0)]
)
def test_the_options_name_the_device(device: object, expected: int) -> None:
    assert HostGpus().numbers(cuda(device)) == {expected}


def test_options_apart_from_the_names_of_providers() -> None:
    found = spec(
        providers=["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
        provider_options=[{"device_id": "2"}, {"device_id": 1}, {}],
    )
    assert HostGpus().numbers(found) == {1, 2}
    assert HostGpus().numbers(spec(providers=["CPUExecutionProvider"])) == frozenset()


def test_a_group_uses_the_devices_of_all_its_members() -> None:
    members = [cuda(0, group="g"), cuda(3, group="g"), spec("c", group="g")]
    assert HostGpus().numbers(group_spec(members)) == {0, 3}


@pytest.mark.parametrize(
    ("of_host", "gpus", "of_model", "device", "expected"),
    [
        ("2,3", (), "2,3", 1, {1}),  # the same list
        ("2,3", (), "3", 0, {1}),
        ("2,3", (), "1", 0, set()),  # the host does not see it
        ("2,3", (), "3", 1, set()),  # there is no second one
        (None, (), "3", 0, {3}),  # the host sees all
        ("2,3", (), None, 3, {1}),  # the model sees all
        (None, (), "GPU-bb", 0, set()),  # not known without NVML
        ("GPU-bb", (), "GPU-bb,GPU-aa", 0, {0}),
        (None, FOUR, "GPU-bb", 0, {1}),
        ("3,GPU-b", FOUR, "1", 0, {1}),  # the start of a UUID is enough
        (None, FOUR, "GPU-cc", 0, set()),  # of two GPUs
        ("3,1", FOUR, "1, 9, 3", 1, set()),  # CUDA sees none from an invalid one on
        ("3,1", FOUR, "1,1", 1, set()),
        ("3,1", FOUR, "-1", 0, set()),
        ("3,1", FOUR, "", 0, set()),
        (None, MIXED, "1", 0, {1}),
        ("GPU-bb", MIXED, "1", 0, set()),  # CUDA's order is not known
    ],
)
def test_a_model_with_a_list_of_its_own(
    of_host: str | None, gpus: list[MachineGpu], of_model: str | None, device: int, expected: set[int]
) -> None:
    model = spec(
        providers=[["CUDAExecutionProvider", {"device_id": device}]],
        environment=Environment({"CUDA_VISIBLE_DEVICES": of_model}),
    )
    assert HostGpus(tuple(gpus), of_host).numbers(model) == expected


@pytest.mark.parametrize(
    ("environ", "gpus", "expected"),
    [
        ({}, FOUR, {0: 80, 1: 80, 2: 80, 3: 40}),
        ({"CUDA_VISIBLE_DEVICES": "3,0"}, FOUR, {0: 40, 1: 80}),
        ({"CUDA_VISIBLE_DEVICES": "GPU-cc2,GPU-aa"}, FOUR, {0: 40, 1: 80}),
        ({"CUDA_VISIBLE_DEVICES": "MIG-1,0"}, FOUR, {1: 80}),
        ({"CUDA_VISIBLE_DEVICES": ""}, FOUR, {}),
        ({}, MIXED, {}),  # CUDA numbers the faster one first
        ({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, MIXED, {0: 24, 1: 80}),
        ({"CUDA_VISIBLE_DEVICES": "1"}, MIXED, {}),
        ({"CUDA_VISIBLE_DEVICES": "GPU-bb"}, MIXED, {0: 80}),
        ({}, [], {}),
    ],
)
def test_figures_of_nvml_by_number(
    environ: dict[str, str], gpus: list[MachineGpu], expected: dict[int, int]
) -> None:
    assert HostGpus.of(gpus, environ).sizes() == expected
