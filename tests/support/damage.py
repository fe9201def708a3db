"""Files as they may become: cut off, mixed up, with something else in the middle.  The same for each seed."""

from __future__ import annotations

import random
from collections.abc import Sequence


def damaged(text: bytes, odd: Sequence[bytes], seed: int) -> bytes:
    """``odd``: what may come into the middle of it."""
    rng = random.Random(seed)
    data = bytearray(text)
    for _ in range(rng.randrange(1, 4)):
        first, last = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        match rng.randrange(6):
            case 0:
                del data[last:]
            case 1:
                del data[first : min(last, first + 9)]
            case 2:
                data[first:first] = data[first:last]
            case 3:
                data[first:first] = rng.randbytes(3)
            case 4:
                data[first : min(last, first + 9)] = rng.choice(odd)
            case 5:
                data[first:first] = rng.choice(odd) * rng.choice((1, 2, 600))
    return bytes(data)


def replaced(text: str, old: Sequence[str], new: Sequence[str], seed: int) -> str:
    """One of ``old`` that stands in the text is one of ``new`` instead: a file of the right form."""
    rng = random.Random(seed)
    there = [part for part in old if part in text]
    return text.replace(rng.choice(there), rng.choice(new), 1)
