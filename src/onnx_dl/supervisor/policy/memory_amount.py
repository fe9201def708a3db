"""Amounts of memory, and limits of it: RAM, GPU memory in all, and GPU memory by device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Final

from msgspec import Meta

UNLIMITED: Final = 1 << 62
"""Bytes: more than any machine has."""
CHANGE: Final = 0.05
"""Share within which two figures count as the same."""
Count = Annotated[int, Meta(ge=0, le=1 << 50)]
"""Bytes, as they may stand in a file."""
_Number = Annotated[int, Meta(ge=0, le=1023)]
"""Number of a device, see :mod:`onnx_dl.supervisor.policy.gpu_devices`."""


@dataclasses.dataclass(frozen=True)
class MemoryAmount:
    """Bytes of each kind of memory.

    ``gpu`` is the total of all GPUs, ``devices`` has the part of it on each GPU, by the GPU's number.  An
    amount has nothing on a device that it does not name.  A limit does not limit such a device.
    """

    ram: Count = 0
    gpu: Count = 0
    devices: dict[_Number, Count] = dataclasses.field(default_factory=dict, hash=False)

    def __add__(self, other: MemoryAmount) -> MemoryAmount:
        both = _merged(self.devices, other.devices, lambda one, more: one + more)
        return MemoryAmount(self.ram + other.ram, self.gpu + other.gpu, both)

    def __sub__(self, other: MemoryAmount) -> MemoryAmount:
        """The difference, on the devices of the first.  What is left of a limit is a limit again."""
        rest = {number: nbytes - other.on(number) for number, nbytes in self.devices.items()}
        return MemoryAmount(self.ram - other.ram, self.gpu - other.gpu, rest)

    def over(self, limit: MemoryAmount) -> MemoryAmount:
        """Excess over a limit, of each kind that it limits; negative where something is left."""
        rest = {number: self.on(number) - most for number, most in limit.devices.items()}
        return MemoryAmount(self.ram - limit.ram, self.gpu - limit.gpu, rest)

    def maximum(self, other: MemoryAmount) -> MemoryAmount:
        """The larger of each kind."""
        both = _merged(self.devices, other.devices, max)
        return MemoryAmount(max(self.ram, other.ram), max(self.gpu, other.gpu), both)

    def minimum(self, limit: MemoryAmount) -> MemoryAmount:
        """The amount, reduced to a limit."""
        reduced = {number: min(n, limit.devices.get(number, n)) for number, n in self.devices.items()}
        gpu = self.gpu - sum(self.devices.values()) + sum(reduced.values())
        return MemoryAmount(min(self.ram, limit.ram), min(gpu, limit.gpu), reduced)

    def fits(self, limit: MemoryAmount) -> bool:
        return self.over(limit).is_nothing

    @property
    def is_nothing(self) -> bool:
        """True if there is no memory of any kind, or less."""
        return self.ram <= 0 and self.gpu <= 0 and all(n <= 0 for n in self.devices.values())

    def on(self, number: int) -> int:
        """Bytes on a device."""
        return self.devices.get(number, 0)

    def is_near(self, other: MemoryAmount) -> bool:
        is_near = near(self.ram, other.ram) and near(self.gpu, other.gpu)
        return is_near and all(near(self.on(n), other.on(n)) for n in {*self.devices, *other.devices})

    def decayed(self, last: MemoryAmount) -> MemoryAmount:
        """The figure after ``last`` was measured: it rises at once, and falls by half of the difference."""
        both = _merged(self.devices, last.devices, decay)
        return MemoryAmount(decay(self.ram, last.ram), decay(self.gpu, last.gpu), both)

    def times(self, factor: float) -> MemoryAmount:
        more = {number: int(nbytes * factor) for number, nbytes in self.devices.items()}
        return MemoryAmount(int(self.ram * factor), int(self.gpu * factor), more)

    def placed(self, numbers: Collection[int]) -> MemoryAmount:
        """The amount of a model that uses these devices: all its GPU memory counts on them."""
        return dataclasses.replace(self, devices=placed(self.gpu, self.devices, numbers))


NOTHING: Final = MemoryAmount()


def placed(nbytes: int, devices: Mapping[int, int], numbers: Collection[int]) -> dict[int, int]:
    """The GPU memory of a model by device: as measured on those that it uses.

    What was measured elsewhere, or on no device, counts on the first of them.
    """
    if not nbytes or not numbers:
        return {}
    found = {number: devices.get(number, 0) for number in sorted(numbers)}
    found[min(numbers)] += max(0, nbytes - sum(found.values()))
    return found


def decay(known: int, last: int) -> int:
    """One figure after ``last`` was measured."""
    return max(last, (known + last) // 2)


def near(one: int, other: int) -> bool:
    """True if two figures count as the same."""
    return abs(one - other) <= CHANGE * max(one, other)


def _merged(
    one: Mapping[int, int], other: Mapping[int, int], merge: Callable[[int, int], int]
) -> dict[int, int]:
    return {number: merge(one.get(number, 0), other.get(number, 0)) for number in {**one, **other}}
