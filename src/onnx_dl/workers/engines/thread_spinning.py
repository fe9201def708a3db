"""The bound on how long idle threads of a worker look for more work before they sleep (they *spin*); pure.

After each piece of work, onnxruntime's threads spin for 2**20 iterations: 32 ms of a core each, measured.
Each worker's threads would do that on cores that other workers need.  The bound is about the time that waking
a thread takes.  The next operator and the next call of a busy model come sooner than that, so one busy model
is as fast as without the bound, and many models take little from each other.  Other workers need not be
known, so no message is.

The number of threads is not changed: with another number, some operators (TreeEnsembleRegressor, Log,
Softplus) compute other bits.  Spinning changes no result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

DURATION: Final = 100
"""Microseconds.  The smallest bound that costs one busy model nothing: with 50, threads sleep between two
calls.  onnxruntime converts them to iterations; measured, threads spin two to six times as long."""

_POOLS: Final = ("session.intra_op.", "session.inter_op.")
_DURATION_KEY: Final = "spin_duration_us"
_CHOICES: Final = ("allow_spinning", _DURATION_KEY)


def spin_entries(config: Mapping[str, str]) -> dict[str, str]:
    """Returns the session config entries that bound spinning; ``config``: those of the user.

    A pool for which the user chose whether, or how long, its threads spin gets none.  onnxruntime before 1.26
    ignores them (https://github.com/microsoft/onnxruntime/pull/27916).
    """
    return {
        pool + _DURATION_KEY: str(DURATION)
        for pool in _POOLS
        if not any(pool + choice in config for choice in _CHOICES)
    }
