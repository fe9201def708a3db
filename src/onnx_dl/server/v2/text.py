"""Text tensors (BYTES) in the protocol's binary form: each item is its length in four bytes, little-endian,
and then its bytes, which are UTF-8 here."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_LENGTH: Final = struct.Struct("<I")
_LONGEST: Final = (1 << 32) - 1


def encode(items: NDArray[Any] | Iterable[str | bytes | memoryview]) -> bytes:
    """Return the binary form of an array of ``str`` or ``bytes``, or of its items; views are of bytes.

    Raises:
        OverflowError: an item has 4 GiB or more.
        UnicodeEncodeError: an item contains surrogates.
    """
    parts: list[bytes | memoryview] = []
    pack = _LENGTH.pack
    for item in items.reshape(-1).tolist() if isinstance(items, np.ndarray) else items:
        data = item.encode() if isinstance(item, str) else item
        if len(data) > _LONGEST:
            raise OverflowError(f"a text of {len(data)} bytes is too long for a length of four bytes")
        parts.append(pack(len(data)))
        parts.append(data)
    return b"".join(parts)


def decode(data: memoryview | bytes, count: int) -> list[str]:
    """Return the ``count`` items of a tensor in binary form.  Nothing is allocated for more items than the
    data may have.

    Raises:
        ValueError: the data has another number of items, ends in the midst of one, or an item is not UTF-8;
            the message has no subject.
    """
    view = memoryview(data).cast("B")
    end = view.nbytes
    if count * _LENGTH.size > end:
        raise ValueError(f"needs at least {count * _LENGTH.size} bytes for {count} texts, and got {end}")
    items: list[str] = []
    unpack, at = _LENGTH.unpack_from, 0
    for index in range(count):
        if at + 4 > end:
            raise ValueError(f"has {index} texts, and its shape wants {count}")
        (length,) = unpack(view, at)
        at += 4
        if at + length > end:
            raise ValueError(
                f"ends in the midst of text {index}, which claims {length} bytes where {end - at} are left"
            )
        try:
            items.append(str(view[at : at + length], "utf-8"))
        except UnicodeDecodeError:
            raise ValueError(
                f"has bytes in text {index} that are not UTF-8, which onnxruntime does not take"
            ) from None
        at += length
    if at != end:
        raise ValueError(f"has {end - at} bytes after its {count} texts")
    return items
