"""Time when the template ends: no application uses models, and none is loaded."""

from __future__ import annotations

from typing import Final

from onnx_dl.core.parsing import KEEP


class TemplateTtl:
    """Decides when the template ends, because nothing was used for as long as its TTL.

    While something is used, a load must not wait for the imports of a new template.  Times are monotonic
    seconds.
    """

    def __init__(self, ttl: float) -> None:
        """``ttl``: seconds; ``KEEP`` (-1): it never ends."""
        self._ttl: Final = ttl
        self._ends_at: float | None = None

    def update(self, now: float, *, used: bool, spare: bool) -> None:
        """Looks again.

        Args:
            used: a proxy that has used a model is open, a model is loaded, or the host holds or awaits one.
            spare: there is a template that is ready and has nothing to do.
        """
        if used or not spare or self._ttl == KEEP:
            self._ends_at = None
        elif self._ends_at is None:
            self._ends_at = now + self._ttl

    def next_deadline(self) -> float | None:
        """Time when :meth:`is_over` becomes true; None: not before something happens."""
        return self._ends_at

    def is_over(self, now: float) -> bool:
        """True if the template is to end now.  Called after :meth:`update`."""
        return self._ends_at is not None and now >= self._ends_at
