"""An engine whose models multiply by the number in their file, and misbehave on request at each step."""

from __future__ import annotations

from typing import Any

import misbehaviour

from onnx_dl.core.status import ModelDescription

misbehaviour.moment("import")


class Model:
    def __init__(self, factor: float) -> None:
        self._factor = factor

    def describe(self) -> ModelDescription:
        return ModelDescription()

    def ready(self, seconds: float, blobs: Any) -> tuple[()]:
        return ()

    def run(self, outputs: Any, feed: dict[str, Any], options: Any, token: Any) -> list[Any]:
        results = [array * self._factor for array in feed.values()]
        misbehaviour.moment("run", results)
        return results

    def bind(self, outputs: Any, feed: Any, results: Any) -> None:
        return None

    def rerun(self, outputs: Any) -> None:
        return None

    def close(self) -> None:
        misbehaviour.moment("close")


def open_model(spec: Any, blobs: Any) -> Model:
    misbehaviour.moment("load")
    with open(spec.path) as file:
        return Model(float(file.read()))
