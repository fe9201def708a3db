"""The GPUs that models use, and their numbers.  Pure.

The number of a GPU is the one that CUDA gives it in the environment of the host: its place in
``CUDA_VISIBLE_DEVICES``.  Limits and figures by device have this number.  A model whose own environment has
another ``CUDA_VISIBLE_DEVICES`` names the same GPU by another number.

NVML numbers all GPUs of the machine by their place on the bus.  CUDA does so, too, if ``CUDA_DEVICE_ORDER``
is ``PCI_BUS_ID``, or if all GPUs are of one type.  If not, NVML's figures are used by number only for GPUs
that are listed by their UUIDs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from onnx_dl.core.spec import ModelSpec

LIST: Final = "CUDA_VISIBLE_DEVICES"
ORDER: Final = "CUDA_DEVICE_ORDER"
_ON_GPUS: Final = (
    "CUDAExecutionProvider",
    "TensorrtExecutionProvider",
    "NvTensorRTRTXExecutionProvider",
    "ROCMExecutionProvider",
    "MIGraphXExecutionProvider",
    "DmlExecutionProvider",
)
_DIGITS: Final = 3
"""Digits of the number of a device at most."""


class MachineGpu(NamedTuple):
    """One GPU, by NVML; ``memory`` in bytes."""

    uuid: str
    kind: str
    memory: int


class HostGpus(NamedTuple):
    """The GPUs of a machine, and which of them a host sees."""

    gpus: tuple[MachineGpu, ...] = ()
    """GPUs by NVML's numbers; empty: NVML is not there."""
    listed: str | None = None
    """``CUDA_VISIBLE_DEVICES`` of the host; None: it is not set, so all are seen."""
    order: str = ""
    """``CUDA_DEVICE_ORDER`` of the host."""

    @classmethod
    def of(cls, gpus: Iterable[MachineGpu], environ: Mapping[str, str]) -> HostGpus:
        return cls(tuple(gpus), environ.get(LIST), environ.get(ORDER, ""))

    def numbers(self, spec: ModelSpec) -> frozenset[int]:
        """Numbers of the GPUs that a model's options name; without those that the host does not see."""
        listed = spec.environment.variables.get(LIST, self.listed)
        found = (self._number(ordinal, listed) for ordinal in ordinals(spec))
        return frozenset(number for number in found if number is not None)

    def by_number(self, figures: Mapping[int, int]) -> dict[int, int]:
        """Figures by NVML's number as figures by the host's; without GPUs that the host does not see."""
        seen = self._seen(self.listed) or []
        at = ((self.gpus[index].uuid, nbytes) for index, nbytes in figures.items() if index < len(self.gpus))
        return {seen.index(uuid): nbytes for uuid, nbytes in at if uuid in seen}

    def sizes(self) -> dict[int, int]:
        """Bytes of each GPU whose number is known."""
        return self.by_number({index: gpu.memory for index, gpu in enumerate(self.gpus)})

    def _number(self, ordinal: int, listed: str | None) -> int | None:
        """The host's number of a GPU that has this one in a process with another list."""
        if listed == self.listed:
            return ordinal
        name: str | None = str(ordinal)
        if (theirs := self._seen(listed)) is not None:
            name = theirs[ordinal] if ordinal < len(theirs) else None
        ours = self._seen(self.listed)
        if name is not None and ours is not None:
            return ours.index(name) if name in ours else None
        return int(name) if name is not None and name.isdecimal() else None

    def _seen(self, listed: str | None) -> list[str] | None:
        """Names of the GPUs that a process with this list sees, in its order; None: the order is unknown."""
        if listed is None:
            return [gpu.uuid for gpu in self.gpus] if self._is_in_order else None
        found: list[str] = []
        for entry in listed.split(","):
            name = self._name(entry.strip())
            if name is None or name in found:  # CUDA sees none from there on
                break
            found.append(name)
        return found

    def _name(self, entry: str) -> str | None:
        """The UUID of a listed GPU, or else the entry itself; None: it is not valid."""
        if entry.isdecimal():
            if not self._is_in_order:
                return str(int(entry))
            return self.gpus[int(entry)].uuid if int(entry) < len(self.gpus) else None
        if not entry.startswith(("GPU-", "MIG-")):
            return None
        meant = [gpu.uuid for gpu in self.gpus if gpu.uuid.startswith(entry)]
        return meant[0] if len(meant) == 1 else entry

    @property
    def _is_in_order(self) -> bool:
        """True if CUDA numbers the GPUs as NVML does."""
        return bool(self.gpus) and (self.order == "PCI_BUS_ID" or len({gpu.kind for gpu in self.gpus}) == 1)


def uses_gpu(spec: ModelSpec) -> bool:
    """True if the model asks for a provider that takes GPU memory."""
    return bool(ordinals(spec))


def ordinals(spec: ModelSpec) -> set[int]:
    """Numbers of devices as the options of a model, or of all models of a group, name them."""
    found = {number for member in spec.members for number in ordinals(member)}
    for place, entry in enumerate(spec.providers or []):
        name, options = (entry, {}) if isinstance(entry, str) else (*entry, "", {})[:2]
        if name in _ON_GPUS:
            apart = spec.provider_options[place : place + 1] if spec.provider_options else []
            found.add(_device_id(*apart, options))
    return found


def _device_id(*options: Any) -> int:
    """The device of a provider; 0 if its options name none, or none that there can be."""
    named = (str(each["device_id"]) for each in options if isinstance(each, Mapping) and "device_id" in each)
    text = next(named, "0").strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= _DIGITS else 0
