"""A child that another thread forks when a descriptor is there and may have no owner yet."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

_CHANCE = 0.5
"""Seconds that the other thread has to fork; it waits in vain if it may not fork now."""


@contextlib.contextmanager
def forked_at(patch: pytest.MonkeyPatch, module: Any, name: str) -> Iterator[None]:
    """Has a child forked when a function of a module returns, the first time in the block.  The child lives
    until the block ends."""
    make, forked, children = getattr(module, name), threading.Event(), []
    end, release = os.pipe()

    def fork() -> None:
        if (pid := os.fork()) == 0:
            try:
                os.read(end, 1)
            finally:
                os._exit(0)
        children.append(pid)
        forked.set()

    def made(*args: Any) -> Any:
        patch.setattr(module, name, make)
        done = make(*args)
        thread.start()
        forked.wait(_CHANCE)
        return done

    thread = threading.Thread(target=fork)
    patch.setattr(module, name, made)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of fork beside threads
        try:
            yield
        finally:
            thread.join()
            os.write(release, b"!")
            os.waitpid(children[0], 0)
            os.close(end)
            os.close(release)
