"""Classes of the protocol's messages, made from the compiled definitions beside this file.

They live in a pool of their own.  The default pool of protobuf is one for the whole process, and a client
library that defines ``inference.ServerLiveRequest`` there could not be imported beside ours.
"""

from __future__ import annotations

import importlib.resources
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

COMPILED: Final = "open_inference.desc"
"""A ``FileDescriptorSet``: model_config.proto, open_inference.proto and health.proto."""
INFERENCE: Final = "inference.GRPCInferenceService"
HEALTH: Final = "grpc.health.v1.Health"

Message = Any
"""A message of protobuf.  Its fields are known at run time only."""


def _pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    compiled = importlib.resources.files(__package__).joinpath(COMPILED).read_bytes()
    for file in descriptor_pb2.FileDescriptorSet.FromString(compiled).file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


POOL: Final = _pool()


def message(name: str) -> type[Message]:
    """Class of the message with this full name."""
    found: type[Message] = message_factory.GetMessageClass(POOL.FindMessageTypeByName(name))
    return found


ModelInferRequest: Final = message("inference.ModelInferRequest")
ModelInferResponse: Final = message("inference.ModelInferResponse")
