"""The gRPC listener before a stand-in, and calls on raw bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import grpc
import numpy as np

from onnx_dl.server.grpc.listener import GrpcListener
from onnx_dl.server.grpc.messages import INFERENCE, Message, ModelInferRequest, message
from onnx_dl.server.options import ServeOptions
from tests.server.standin import StandIn, running_loop
from tests.support.waiting import DEADLINE, allowed

UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


class Rig:
    """A listener and what is before and behind it."""

    def __init__(self, server: StandIn, listener: GrpcListener, address: str) -> None:
        self.server = server
        self.listener = listener
        self.address = address
        self.channel = grpc.insecure_channel(address, options=UNLIMITED)

    @property
    def places(self) -> Any:
        return self.listener._service.inferences

    def unary(self, name: str, data: bytes, **keywords: Any) -> bytes:
        """One call on raw bytes."""
        call = self.channel.unary_unary(f"/{INFERENCE}/{name}")
        answer: bytes = call(data, **{"timeout": DEADLINE, **keywords})
        return answer

    def sending(self, name: str, messages: Iterable[bytes], **keywords: Any) -> Any:
        """One call whose messages come one by one.  A future of its answer, and the call."""
        call = self.channel.stream_unary(f"/{INFERENCE}/{name}")
        return call.future(iter(messages), **{"timeout": DEADLINE, **keywords})

    def stream(self, messages: Iterable[bytes], **keywords: Any) -> Any:
        """A ModelStreamInfer on raw bytes: an iterator of answers, and the call."""
        call = self.channel.stream_stream(f"/{INFERENCE}/ModelStreamInfer")
        return call(iter(messages), **{"timeout": DEADLINE, **keywords})


@contextlib.contextmanager
def listening(
    options: ServeOptions | None = None, credentials: grpc.ServerCredentials | None = None
) -> Iterator[Rig]:
    with running_loop() as loop:
        server = StandIn(options)
        listener = GrpcListener(server, loop)
        rig = Rig(server, listener, listener.start("127.0.0.1:0", credentials))
        if credentials is None:
            grpc.channel_ready_future(rig.channel).result(allowed(DEADLINE))
        try:
            yield rig
        finally:
            rig.channel.close()
            listener.close()


def a_request(
    array: np.ndarray[Any, Any] | None = None, *, model: str = "echo", **parameters: Any
) -> Message:
    """A request of the model ``echo`` with FP32 numbers."""
    array = np.float32([1, 2, 3]) if array is None else array
    request = ModelInferRequest(model_name=model, raw_input_contents=[array.tobytes()])
    request.id = str(parameters.pop("id", ""))
    request.inputs.add(name="x", datatype="FP32", shape=array.shape)
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    for name, value in parameters.items():
        setattr(request.parameters[name], kinds[type(value)], value)
    return request


def raw_request(array: np.ndarray[Any, Any] | None = None, **fields: Any) -> bytes:
    data: bytes = a_request(array, **fields).SerializeToString()
    return data


def streamed(data: bytes) -> Message:
    """An answer of a stream."""
    return message("inference.ModelStreamInferResponse").FromString(data)


def code_of(error: BaseException | None) -> str:
    """Name of the status of a call that failed."""
    assert isinstance(error, grpc.RpcError), error
    return str(error.code().name)
