"""A failure ends what it concerns, and nothing else; it is told once.

Around each client, each worker, the template, the saver, the host's file, the page of metrics and each
command.  What follows for what failed is said by whoever sets the boundary: the loop itself has none, so that
what nobody thought of ends the process instead of going on half done.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator

from onnx_dl.errors import InvalidTransition, OnnxDLError


@contextlib.contextmanager
def boundary(what: str, end: Callable[[Exception], object] | None = None) -> Iterator[None]:
    """A failure within the block is told, and ``end`` called with it: it ends ``what`` it concerns."""
    try:
        yield
    except Exception as error:
        tell_failure(what, error)
        if end is not None:
            end(error)


def tell(text: str) -> None:
    """Says on stderr what nobody else is told."""
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
        print(f"onnx-dl: {text}", file=sys.stderr, flush=True)


def tell_failure(what: str, error: Exception) -> None:
    """One line for what was to be expected: a peer's nonsense, or what the system refuses; else all of it."""
    if isinstance(error, OSError | OnnxDLError) and not isinstance(error, InvalidTransition):
        tell(f"{what}: {error}")
    else:
        tell(f"{what}: {''.join(traceback.format_exception(error)).rstrip()}")
