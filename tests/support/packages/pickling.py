"""What insightface does: a subclass of InferenceSession, imported by name, that can be pickled."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from onnxruntime import InferenceSession
from shown import show

from onnx_dl.demo.assets import model_path


class PickableInferenceSession(InferenceSession):
    """As insightface's, whose model_path is all that it keeps; and with a count of its own."""

    def __init__(self, model_path: str, **kwargs: Any) -> None:
        super().__init__(model_path, **kwargs)
        self.model_path = model_path
        self.runs = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"model_path": self.model_path}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__init__(values["model_path"])

    def run(self, output_names: Any, input_feed: Any, run_options: Any = None) -> Any:
        self.runs += 1
        return super().run(output_names, input_feed, run_options)


def work() -> tuple[Any, Any]:
    session = PickableInferenceSession(str(model_path("digits")), providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).integers(0, 17, (20, 64)).astype(np.float32)
    file = io.BytesIO()
    pickle.dump([session, session], file)
    same, again = pickle.loads(file.getvalue())
    assert same is again
    copies = [session, same, copy.copy(session), copy.deepcopy(session)]
    for each in copies:
        assert type(each) is PickableInferenceSession
        assert isinstance(each, InferenceSession)
        assert not hasattr(each, "no_such_attribute")
    name = copies[1].get_inputs()[0].name
    found = [
        [each.run(None, {name: row[None]}) for row in pixels] + [each.run([], {name: pixels})]
        for each in copies
    ]
    with ThreadPoolExecutor(2) as pool:
        found.append(list(pool.map(lambda row: copies[0].run(None, {name: row[None]}), pixels)))
    told = [
        (
            [(node.name, node.type, node.shape) for node in (*each.get_inputs(), *each.get_outputs())],
            each.get_providers(),
            each.get_modelmeta().graph_name,
            each.runs,
            sorted(each.__getstate__()),
        )
        for each in copies
    ]
    bound = copies[2].io_binding()
    bound.bind_cpu_input(name, pixels)
    for node in copies[2].get_outputs():
        bound.bind_output(node.name)
    copies[2].run_with_iobinding(bound)
    return [found, told, bound.copy_outputs_to_cpu()], copies


if __name__ == "__main__":
    show(work)
