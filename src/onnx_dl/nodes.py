"""Metadata objects shaped like onnxruntime's, which have no constructors: NodeArg, ModelMetadata."""

from __future__ import annotations

from typing import Any

from onnx_dl.model import TensorSpec


class NodeArg:
    """An input, output or initializer of a model, like ``onnxruntime.NodeArg``; read-only.

    ``shape`` holds an int for a fixed dimension, a name for a symbolic one and None for an unknown one.
    """

    __slots__ = ("_spec",)

    def __init__(self, spec: TensorSpec) -> None:
        self._spec = spec

    @property
    def name(self) -> str:
        return self._spec.name

    @property
    def type(self) -> str:
        """For example ``tensor(float)``."""
        return self._spec.type

    @property
    def shape(self) -> list[int | str | None]:
        return list(self._spec.shape)

    def __str__(self) -> str:
        return f"NodeArg(name='{self.name}', type='{self.type}', shape={self.shape})"

    __repr__ = __str__


class ModelMetadata:
    """What the model's author wrote into it, like ``onnxruntime.ModelMetadata``; a copy, writable."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.custom_metadata_map: dict[str, str] = fields["custom_metadata_map"]
        self.description: str = fields["description"]
        self.domain: str = fields["domain"]
        self.graph_description: str = fields["graph_description"]
        self.graph_name: str = fields["graph_name"]
        self.producer_name: str = fields["producer_name"]
        self.version: int = fields["version"]


class Description:
    """A model's metadata as the objects that onnxruntime returns; the same objects at each call."""

    def __init__(self, described: Any) -> None:
        self.inputs = [NodeArg(spec) for spec in described.inputs]
        self.outputs = [NodeArg(spec) for spec in described.outputs]
        self.overridable_initializers = [NodeArg(spec) for spec in described.overridable_initializers]
        self.modelmeta = ModelMetadata(described.modelmeta)
        self.providers: list[str] = described.providers
        self.provider_options: dict[str, dict[str, str]] = described.provider_options
        self.options: dict[str, Any] = described.options
