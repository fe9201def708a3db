"""Error boundaries: a failure ends what it concerns, and nothing else; it is reported once.

There is one around each client, each worker, the template, the saver, the host's file, the page of metrics
and each command.  The loop itself has none: an unforeseen error ends the process, instead of leaving it half
working.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator

from onnx_dl.errors import InvalidTransition, OnnxDLError, SupervisorError
from onnx_dl.protocol import failures
from onnx_dl.protocol import failures as m


@contextlib.contextmanager
def boundary(what: str, end: Callable[[Exception], object] | None = None) -> Iterator[None]:
    """Reports an error raised in the block, and calls ``end`` with it to end what it concerns."""
    try:
        yield
    except Exception as error:
        report_failure(what, error)
        if end is not None:
            end(error)


def report(text: str) -> None:
    """Prints one line on stderr."""
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
        print(f"onnx-dl: {text}", file=sys.stderr, flush=True)


def report_failure(what: str, error: Exception) -> None:
    """Prints an expected error (bad data of a peer, a refusal by the system), or another with traceback."""
    if isinstance(error, OSError | OnnxDLError) and not isinstance(error, InvalidTransition):
        report(f"{what}: {error}")
    else:
        report(f"{what}: {''.join(traceback.format_exception(error)).rstrip()}")


def as_failure(error: Exception) -> m.Failure:
    """Describes an error of the host for a caller, always as an error of onnx-dl."""
    if not isinstance(error, OnnxDLError):
        error = SupervisorError(
            f"The host failed ({type(error).__name__}: {error}); its stderr says where. This is a bug in "
            "onnx-dl. Other loaded models are not affected."
        )
    return failures.describe(error)
