"""A runtime of MLServer around onnxruntime.  It runs in the peer's interpreter."""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse
from mlserver.utils import get_model_uri


class OnnxRuntime(MLModel):
    """One model; ``parameters.extra`` of its settings has ``threads``."""

    async def load(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.settings.parameters.extra["threads"]
        options.inter_op_num_threads = 1
        path = await get_model_uri(self.settings)
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return True

    async def predict(self, payload):
        feed = {sent.name: NumpyCodec.decode_input(sent) for sent in payload.inputs}
        names = [output.name for output in self._session.get_outputs()]
        found = self._session.run(names, feed)
        outputs = [NumpyCodec.encode_output(name, array) for name, array in zip(names, found, strict=True)]
        return InferenceResponse(model_name=self.name, model_version=self.version, outputs=outputs)
