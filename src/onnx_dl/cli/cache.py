"""``onnx-dl cache``: lists and removes the entries of the load cache."""

from __future__ import annotations

import datetime

from onnx_dl.cli.output import print_line
from onnx_dl.core.text import format_bytes
from onnx_dl.workers.load_cache.store import open_cache


def ls() -> None:
    """Prints size, last use and model of each entry, the last used first."""
    store = open_cache()
    entries = store.entries()
    for entry in entries:
        used = datetime.datetime.fromtimestamp(entry.used).isoformat(" ", "minutes")
        print_line(f"{format_bytes(entry.nbytes):>12}  {used}  {entry.meta.name}")
    print_line(
        f"{len(entries)} models, {format_bytes(sum(entry.nbytes for entry in entries))}, in {store.root}"
    )


def clear() -> None:
    """Removes all entries and prints how much that was."""
    store = open_cache()
    print_line(f"{format_bytes(store.clear())} removed from {store.root}")
