"""Memory of models in this process: how much the process grew while each was loaded."""

from __future__ import annotations

from onnx_dl.concurrency.forking import importing
from onnx_dl.core.status import Usage


def resident_bytes() -> int:
    """Resident memory of this process."""
    psutil = importing("psutil")  # takes 10 ms, which only in-process models need
    return int(psutil.Process().memory_info().rss)


def machine_bytes() -> int:
    """Memory of the machine."""
    return int(importing("psutil").virtual_memory().total)


class GrowthMeter:
    """Shares the growth of the process among its loads.

    Loads may overlap.  Growth that one of them has booked does not count for the others, so that the figures
    of all add up to the growth.  What the application itself allocates meanwhile counts, too.
    """

    def __init__(self) -> None:
        self._begun: dict[int, int] = {}
        """Resident bytes at the begin of each load, and what others have booked since."""

    def begin(self, load: int, resident: int) -> None:
        """A load begins at this many resident bytes."""
        self._begun[load] = resident

    def growth(self, load: int, resident: int) -> int:
        """Bytes of a load so far."""
        return max(0, resident - self._begun.get(load, resident))

    def end(self, load: int, resident: int) -> int:
        """Books the bytes of a load that has ended, and returns them."""
        begun = self._begun.pop(load, resident)
        for other, since in list(self._begun.items()):
            self._begun[other] = since + max(0, resident - max(begun, since))
        return max(0, resident - begun)


def usage_of(grown: int, file_bytes: int) -> Usage:
    """The usage of a model: its growth, or the size of its files where pages in use before hide that."""
    nbytes = max(grown, file_bytes)
    return Usage(rss=nbytes, private=nbytes, pss=nbytes, peak=nbytes)
