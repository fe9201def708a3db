"""Metadata objects like onnxruntime's, whose classes have no constructors: NodeArg, ModelMetadata."""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING, Any

from onnx_dl.concurrency.forking import lazily
from onnx_dl.core.status import ModelDescription, TensorSpec
from onnx_dl.ort import options, recordings

if TYPE_CHECKING:
    import onnxruntime


class NodeArg:
    """An input, output or initializer of a model, like ``onnxruntime.NodeArg``; read-only."""

    __slots__ = ("_spec",)

    def __init__(self, spec: TensorSpec) -> None:
        self._spec = spec

    @property
    def name(self) -> str:
        """Name in the model, the key of a feed."""
        return self._spec.name

    @property
    def type(self) -> str:
        """Type in onnxruntime's words, such as ``tensor(float)``."""
        return self._spec.type

    @property
    def shape(self) -> list[int | str | None]:
        """An int for a fixed dimension, a name for a symbolic one, None for an unknown one."""
        return list(self._spec.shape)

    def __str__(self) -> str:
        return f"NodeArg(name='{self.name}', type='{self.type}', shape={self.shape})"

    __repr__ = __str__


@dataclasses.dataclass(eq=False, repr=False)
class ModelMetadata:
    """Metadata from the model file, like ``onnxruntime.ModelMetadata``; a writable copy."""

    custom_metadata_map: dict[str, str]
    description: str
    domain: str
    graph_description: str
    graph_name: str
    producer_name: str
    version: int


@dataclasses.dataclass(eq=False, repr=False)
class AssignedNode:
    """A node that is assigned to an execution provider, like ``onnxruntime.OrtEpAssignedNode``."""

    name: str
    domain: str
    op_type: str


class AssignedSubgraph:
    """A subgraph that is assigned to an execution provider, like ``onnxruntime.OrtEpAssignedSubgraph``.

    Attributes:
        ep_name: name of the provider.
    """

    def __init__(self, ep_name: str, nodes: list[list[str]]) -> None:
        self.ep_name = ep_name
        self._nodes = [AssignedNode(*node) for node in nodes]

    def get_nodes(self) -> list[AssignedNode]:
        """The nodes of the subgraph."""
        return self._nodes


class Description:
    """A model's metadata as objects like those that onnxruntime returns; each is made once."""

    def __init__(self, described: ModelDescription) -> None:
        self.inputs = [NodeArg(spec) for spec in described.inputs]
        self.outputs = [NodeArg(spec) for spec in described.outputs]
        self.overridable_initializers = [NodeArg(spec) for spec in described.overridable_initializers]
        self.modelmeta = ModelMetadata(**described.modelmeta)
        self.providers: list[str] = described.providers
        self.provider_options: dict[str, dict[str, str]] = described.provider_options
        self.details = described.details
        self._options = described.options

    @lazily
    def session_options(self) -> onnxruntime.SessionOptions:
        """Options in force, as an ``onnxruntime.SessionOptions``."""
        return options.make_session_options(self._options)

    @lazily
    def input_memory_infos(self) -> list[onnxruntime.OrtMemoryInfo]:
        """Memory of the inputs."""
        return [_memory_info(*info) for info in self.details["input_memory_infos"]]

    @lazily
    def output_memory_infos(self) -> list[onnxruntime.OrtMemoryInfo]:
        """Memory of the outputs."""
        return [_memory_info(*info) for info in self.details["output_memory_infos"]]

    @lazily
    def input_epdevices(self) -> list[onnxruntime.OrtEpDevice | None]:
        """The process's devices that are the worker's; None where it has none."""
        local = importlib.import_module("onnxruntime").get_ep_devices()
        known = [(recordings.device_identity(device), device) for device in local]
        return [
            next((device for identity, device in known if identity == wanted), None)
            for wanted in self.details["input_epdevices"]
        ]


class _Gone:
    """Metadata of a session whose providers could not be set: None throughout, as in onnxruntime."""

    def __getattr__(self, name: str) -> None:
        return None


GONE: Any = _Gone()


def _memory_info(name: str, allocator: str, device_id: int, mem_type: str) -> onnxruntime.OrtMemoryInfo:
    onnxruntime = importlib.import_module("onnxruntime")
    allocator_type = getattr(onnxruntime.OrtAllocatorType, allocator)
    return onnxruntime.OrtMemoryInfo(
        name, allocator_type, device_id, getattr(onnxruntime.OrtMemType, mem_type)
    )
