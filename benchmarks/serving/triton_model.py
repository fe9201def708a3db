"""A model of Triton's Python backend that runs ``model.onnx`` beside it, in the peer's interpreter."""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """The name that the backend looks for."""

    def initialize(self, args):
        import json

        parameters = json.loads(args["model_config"])["parameters"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(parameters["threads"]["string_value"])
        options.inter_op_num_threads = 1
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        feed = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        names = list(request.requested_output_names())
        found = self._session.run(names, feed)
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, array) for name, array in zip(names, found, strict=True)]
        )
