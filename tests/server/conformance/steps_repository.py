"""Index, load, unload."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from tests.server.conformance.clients import Kit
from tests.server.conformance.registry import step


def _index(kit: Kit) -> list[dict[str, Any]]:
    found = kit.call("get_model_repository_index")
    rows = found if isinstance(found, list) else found.get("models", [])
    return sorted(rows, key=lambda row: (row["name"], row.get("version", "")))


@step
def index(kit: Kit) -> Any:
    return _index(kit)


@step
def unload_and_load(kit: Kit) -> Any:
    told: list[Any] = [kit.call("unload_model", "text"), kit.call("is_server_ready")]
    told += [kit.call("is_model_ready", "text"), kit.call("load_model", "text")]
    told += [kit.call("is_model_ready", "text"), [row for row in _index(kit) if row["name"] == "text"]]
    return told


@contextmanager
def _unloaded(kit: Kit) -> Iterator[None]:
    kit.call("unload_model", "text")
    try:
        yield
    finally:
        kit.call("load_model", "text")


@step
def metadata_of_an_unloaded_model(kit: Kit) -> Any:
    with _unloaded(kit):
        return kit.call("get_model_metadata", "text")


@step
def infer_an_unloaded_model(kit: Kit) -> Any:
    with _unloaded(kit):
        return kit.infer("text", [kit.input("INPUT", np.array([["a"]], np.object_), "BYTES")])


@step
def load_a_loaded_model(kit: Kit) -> Any:
    return [kit.call("load_model", "simple"), kit.call("is_model_ready", "simple")]


@step
def load_an_unknown_model(kit: Kit) -> Any:
    return kit.call("load_model", "unknown")


@step
def load_a_broken_model(kit: Kit) -> Any:
    return kit.call("load_model", "broken")


@step
def unload_an_unknown_model(kit: Kit) -> Any:
    return kit.call("unload_model", "unknown")
