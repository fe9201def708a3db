"""Native threads in an application, also where ``threading`` is patched."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from onnx_dl.concurrency import primitives
from onnx_dl.concurrency.forking import Promise


class Thread(primitives.Thread):
    """A daemon thread.  A patched ``threading`` does not list it."""

    def __init__(self, target: Callable[..., object], name: str, args: tuple[object, ...] = ()) -> None:
        super().__init__(target=target, name=name, args=args, daemon=True)
        self._native: Promise[None] | None = None
        """Fulfilled at its end, if it was not started by ``threading``."""
        self._native_ident: int | None = None

    @property
    def number(self) -> int | None:
        """Its native number; None before it runs."""
        return self.ident if self._native is None else self._native_ident

    @property
    def is_this(self) -> bool:
        """Whether it is the calling thread, and has not ended."""
        return self.number == primitives.get_ident() and self.is_alive()

    def start(self) -> None:
        if not primitives.is_patched("_thread"):
            super().start()
            return
        self._native = Promise()
        self._native_ident = primitives.start_new_thread(self._run_native, ())

    def _run_native(self) -> None:
        assert self._native is not None
        self._native_ident = primitives.get_ident()
        try:
            self.run()
        except SystemExit:
            pass
        except BaseException as error:
            threading.excepthook(threading.ExceptHookArgs((type(error), error, error.__traceback__, self)))
        finally:
            self._native.set_result(None)

    def is_alive(self) -> bool:
        return super().is_alive() if self._native is None else not self._native.done()

    def join(self, timeout: float | None = None) -> None:
        if self._native is None:
            super().join(timeout)
            return
        with contextlib.suppress(Exception):  # it was not in time, or is not in this forked child
            self._native.result(timeout)
