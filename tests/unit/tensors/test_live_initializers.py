"""Memory that a worker sees as it changes."""

from __future__ import annotations

import os

import numpy as np

from onnx_dl.tensors.live_initializers import LiveMemory, view


def test_what_changes_is_copied() -> None:
    arrays = [np.zeros(3 << 20, np.uint8), np.ones(5, np.uint8), np.empty(0, np.uint8)]
    memory = LiveMemory(arrays, None)
    seen = view(memory.descriptor())
    first, second, _ = memory.places
    assert second % 64 == 0
    assert seen[second : second + 5].tolist() == [1] * 5
    arrays[0][2 << 20] = 7
    arrays[1][4] = 9
    assert seen[first + (2 << 20)] == 0
    memory.refresh()
    assert seen[first + (2 << 20)] == 7
    assert seen[second : second + 5].tolist() == [1, 1, 1, 1, 9]


def test_descriptors_are_the_askers_to_close() -> None:
    memory = LiveMemory([np.ones(1, np.uint8)], None)
    one, two = memory.descriptor(), memory.descriptor()
    os.close(one)
    assert view(two)[0] == 1
    assert memory.name != LiveMemory([], None).name
