"""Setting of the heap for processes that load models: a variable that glibc reads when a program starts.

glibc keeps up to seven freed blocks of each small size in a cache of the thread (tcache).  While onnxruntime
loads a model from the load cache, it takes one aligned buffer for each weight after another.  glibc frees the
rest of each such block.  Rests in the tcache keep a buffer from being used again: up to seven buffers lie in
fresh memory, whose page faults can take as long as a third of the load (docs/performance.md).  With three
blocks a size, it is three buffers at most.  Other C libraries ignore the variable.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Final

_VARIABLE: Final = "GLIBC_TUNABLES"
_COUNT: Final = "glibc.malloc.tcache_count"
_OURS: Final = f"{_COUNT}=0x3"
"""Setting in a notation that nobody else uses, so that :func:`take_out` finds it."""


def put_in(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment for a process whose heap is set so; a count that the user set stays."""
    given = environ.get(_VARIABLE, "")
    if _COUNT in given:
        return dict(environ)
    return {**environ, _VARIABLE: f"{given}:{_OURS}" if given else _OURS}


def take_out(environ: MutableMapping[str, str]) -> None:
    """Restores the environment of this process, which others inherit: its heap is set."""
    given = environ.get(_VARIABLE, "")
    if given == _OURS:
        del environ[_VARIABLE]
    elif given.endswith(f":{_OURS}"):
        environ[_VARIABLE] = given.removesuffix(f":{_OURS}")
