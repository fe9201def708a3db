"""Memory that a descriptor leads to, on platforms without memfd: a temporary file without a name.

Serves models that run in-process from bytes or with live initializers.  The file is deleted with its last
descriptor and mapping: on Unix it has no name, and Windows deletes it when it is closed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from typing import Final

from onnx_dl.concurrency import primitives
from onnx_dl.errors import SharedMemoryError

_CHUNK: Final = 1 << 20


def create(size: int) -> int:
    """Create ``size`` bytes of zeros; return the descriptor, which the caller closes.  The zeros are written,
    so that a full disk is an error here and not at a later access.

    Raises:
        SharedMemoryError: there is no folder for temporary files, or no room in it.
    """
    try:
        with tempfile.TemporaryFile() as file:
            for start in range(0, size, _CHUNK):
                file.write(bytes(min(_CHUNK, size - start)))
            file.flush()
            return os.dup(file.fileno())
    except OSError as error:
        raise SharedMemoryError(
            f"The system refused a temporary file of {size} bytes for tensors ({error.strerror or error}). "
            "Free disk space, or set TMPDIR (on Windows TEMP) to a folder with more."
        ) from None


class TemporaryMapping:
    """A writable mapping of such a file.  Has what live initializers use of
    :class:`~onnx_dl.tensors.segment.Mapping`."""

    def __init__(self, fd: int, size: int) -> None:
        """Takes ownership of ``fd``.  Raises SharedMemoryError if the file cannot be mapped."""
        self._fd = fd
        self.size = size
        try:
            self._memory = mmap.mmap(fd, size)
        except (OSError, ValueError) as error:
            raise SharedMemoryError(f"Cannot map {size} bytes of a temporary file: {error}.") from None
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    @property
    def __array_interface__(self) -> dict[str, object]:
        return {"version": 3, "typestr": "|u1", "shape": (self.size,), "data": (self._address, False)}

    def duplicate(self) -> int | None:
        """Return another descriptor of the file, which the caller closes."""
        return os.dup(self._fd)

    def __del__(self) -> None:
        primitives.close(self._fd)
