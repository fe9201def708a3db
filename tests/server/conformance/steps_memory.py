"""Shared memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException

from tests.server.conformance.clients import Kit
from tests.server.conformance.registry import pair, row, step
from tests.support.waiting import eventually


@contextmanager
def _region(size: int) -> Iterator[tuple[str, Any]]:
    key = f"/conformance-{os.getpid()}"
    region = shm.create_shared_memory_region("local", key, size)
    try:
        yield key, region
    finally:
        shm.destroy_shared_memory_region(region)


def _unregister(kit: Kit) -> None:
    """Tritonserver may hold a region for a moment after the answer."""

    def is_done() -> bool:
        try:
            kit.call("unregister_system_shared_memory", "data")
        except InferenceServerException as error:
            if "in use" in error.message():
                return False
            raise
        return True

    eventually(is_done, "a region that is not in use")


@step
def shm_status_of_none(kit: Kit) -> Any:
    return kit.call("get_system_shared_memory_status")


@step
def shm_register_and_unregister(kit: Kit) -> Any:
    with _region(8192) as (key, _):
        told = [kit.call("register_system_shared_memory", "data", key, 128, offset=4096)]
        status = kit.call("get_system_shared_memory_status")
        rows = status if isinstance(status, list) else list(status["regions"].values())
        told.append([{**row, "key": "key"} for row in rows])
        told.append(kit.call("unregister_system_shared_memory", "data"))
        told.append(kit.call("get_system_shared_memory_status"))
        return told


@step
def shm_register_an_offset_within_a_page(kit: Kit) -> Any:
    with _region(256) as (key, _):
        try:
            return kit.call("register_system_shared_memory", "data", key, 128, offset=64)
        finally:
            _unregister(kit)


@step
def shm_infer(kit: Kit) -> Any:
    with _region(256) as (key, region):
        shm.set_shared_memory_region(region, [row(), row(10)])
        kit.call("register_system_shared_memory", "data", key, 256)
        try:
            inputs = [kit.base.InferInput(f"INPUT{i}", [1, 16], "INT32") for i in range(2)]
            outputs = [kit.output(f"OUTPUT{i}") for i in range(2)]
            for i in range(2):
                inputs[i].set_shared_memory("data", 64, offset=64 * i)
                outputs[i].set_shared_memory("data", 64, offset=128 + 64 * i)
            response = kit.response(kit.raw("infer", "simple", inputs, outputs=outputs))
            found = shm.get_contents_as_numpy(region, np.int32, [4, 16])
            return [response, found[2:].tolist()]
        finally:
            _unregister(kit)


@step
def shm_register_twice(kit: Kit) -> Any:
    with _region(256) as (key, _):
        kit.call("register_system_shared_memory", "data", key, 256)
        try:
            return kit.call("register_system_shared_memory", "data", key, 256)
        finally:
            _unregister(kit)


@step
def shm_register_a_key_that_is_not_there(kit: Kit) -> Any:
    return kit.call("register_system_shared_memory", "data", "/conformance-missing", 256)


@step
def shm_register_more_than_there_is(kit: Kit) -> Any:
    with _region(256) as (key, _):
        try:
            return kit.call("register_system_shared_memory", "data", key, 1 << 20)
        finally:
            _unregister(kit)


@step
def shm_unregister_an_unknown_region(kit: Kit) -> Any:
    return kit.call("unregister_system_shared_memory", "unknown")


@step
def shm_unregister_all(kit: Kit) -> Any:
    return kit.call("unregister_system_shared_memory")


@step
def shm_status_of_an_unknown_region(kit: Kit) -> Any:
    return kit.call("get_system_shared_memory_status", "unknown")


@step
def shm_infer_an_unknown_region(kit: Kit) -> Any:
    inputs = pair(kit)
    inputs[0].set_shared_memory("unknown", 64)
    return kit.infer("simple", inputs)


@step
def shm_infer_beyond_a_region(kit: Kit) -> Any:
    with _region(256) as (key, _):
        kit.call("register_system_shared_memory", "data", key, 256)
        try:
            inputs = pair(kit)
            inputs[0].set_shared_memory("data", 64, offset=224)
            return kit.infer("simple", inputs)
        finally:
            _unregister(kit)


@step
def shm_infer_an_output_that_is_larger_than_its_place(kit: Kit) -> Any:
    with _region(256) as (key, _):
        kit.call("register_system_shared_memory", "data", key, 256)
        try:
            outputs = [kit.output("OUTPUT0")]
            outputs[0].set_shared_memory("data", 32)
            return kit.infer("simple", pair(kit), outputs=outputs)
        finally:
            _unregister(kit)


@step
def cuda_shm_status(kit: Kit) -> Any:
    return kit.call("get_cuda_shared_memory_status")


@step
def cuda_shm_register(kit: Kit) -> Any:
    return kit.call("register_cuda_shared_memory", "data", b"x" * 64, 0, 256)


@step
def cuda_shm_unregister(kit: Kit) -> Any:
    return kit.call("unregister_cuda_shared_memory")
