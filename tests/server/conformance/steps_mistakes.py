"""Inferences that the server refuses."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.server.conformance.clients import Kit
from tests.server.conformance.registry import pair, row, step


@step
def infer_an_unknown_model(kit: Kit) -> Any:
    return kit.infer("unknown", pair(kit))


@step
def infer_an_unknown_version(kit: Kit) -> Any:
    return kit.infer("versions", pair(kit), model_version="2")


@step
def infer_without_an_input(kit: Kit) -> Any:
    return kit.infer("simple", pair(kit)[:1])


@step
def infer_with_an_input_too_many(kit: Kit) -> Any:
    return kit.infer("simple", [*pair(kit), kit.input("INPUT2", row(), "INT32")])


@step
def infer_with_an_input_twice(kit: Kit) -> Any:
    return kit.infer("simple", [pair(kit)[0]] * 2)


@step
def infer_with_an_unknown_input(kit: Kit) -> Any:
    return kit.infer("simple", [pair(kit)[0], kit.input("OTHER", row(), "INT32")])


@step
def infer_an_unknown_output(kit: Kit) -> Any:
    return kit.infer("simple", pair(kit), outputs=[kit.output("OUTPUT2")])


@step
def infer_another_datatype(kit: Kit) -> Any:
    inputs = [kit.input(f"INPUT{i}", row().astype(np.float32), "FP32") for i in range(2)]
    return kit.infer("simple", inputs)


@step
def infer_another_shape(kit: Kit) -> Any:
    return kit.infer("simple", [kit.input(f"INPUT{i}", row()[:, :8], "INT32") for i in range(2)])


@step
def infer_another_number_of_dimensions(kit: Kit) -> Any:
    return kit.infer("simple", [kit.input(f"INPUT{i}", row()[0], "INT32") for i in range(2)])


@step
def infer_too_many_rows(kit: Kit) -> Any:
    return kit.infer("simple", pair(kit, 9))


@step
def infer_less_data_than_the_shape_says(kit: Kit) -> Any:
    inputs = pair(kit)
    if kit.is_http:
        inputs[0]._raw_data = inputs[0]._raw_data[:-4]
        inputs[0]._parameters["binary_data_size"] -= 4
    else:
        inputs[0]._raw_content = inputs[0]._raw_content[:-4]
    return kit.infer("simple", inputs)


@step
def infer_a_huge_shape(kit: Kit) -> Any:
    inputs = pair(kit)
    inputs[0].set_shape([8, 2**40])
    return kit.infer("simple", inputs)
