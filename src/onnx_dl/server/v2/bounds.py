"""Bounds of the items of a request and its answer, where each becomes an object of Python.

Bytes alone do not bound that: an empty text has four, a number of JSON has two.  An object takes up to 60
bytes, and a tenth of a microsecond to a microsecond.
"""

from __future__ import annotations

from typing import Final

MOST_VALUES: Final = 1 << 24
"""Values of the JSON of a request, and of the outputs that are answered in JSON."""
MOST_TEXTS: Final = 1 << 22
"""Items of all BYTES inputs of a request."""

AT_ONCE_BYTES: Final = 1 << 20
"""Bytes of JSON that an event loop decodes or encodes itself.  A thread does more."""
AT_ONCE_VALUES: Final = 100_000
"""Numbers of outputs in JSON, likewise: about 1 MB."""
AT_ONCE_TEXTS: Final = 10_000
"""Items of BYTES, likewise."""
AT_ONCE_COPIED: Final = 16 << 20
"""Bytes that may have to be copied or looked at, likewise."""
