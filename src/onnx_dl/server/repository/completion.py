"""A configuration and a model's signature together: what is served, and the whole configuration in JSON.

The form is Triton's answer to GET v2/models/M/config: every field of the message that has a default is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

from onnx_dl.server.interfaces import TensorInfo
from onnx_dl.server.repository.config import BACKEND, PLATFORM, Configuration, Declared
from onnx_dl.server.repository.signature import ModelSignature, Unservable
from onnx_dl.server.repository.source import Source


class Completed(NamedTuple):
    """The view of clients: inputs and outputs with the batch, and the configuration."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    config: dict[str, Any]


def complete(
    name: str,
    filename: str,
    signature: ModelSignature,
    configuration: Configuration,
    source: Source | None = None,
) -> Completed:
    """Compares a configuration with the model and completes it.

    Args:
        name: of the model.
        filename: of the model's file.
        signature: of the model.
        configuration: as :func:`~onnx_dl.server.repository.config.understood`.
        source: where the configuration comes from; None: there is none.

    Raises:
        Refused: they contradict each other, with file and line.
        Unservable: the protocol has no words for an output that is to be served.
    """
    source = source or Source(f"model '{name}'", {})
    named = {each.name for each in configuration.outputs}
    for output, problem in signature.problems.items():
        if output in named or not signature.outputs:
            raise Unservable(problem)
    checker = _Checker(source, configuration.max_batch_size)
    checker.check_batch([*signature.inputs, *signature.outputs])
    optional = {each.name: each for each in signature.overridable}
    wanted = {each.name for each in configuration.inputs}
    own = [*signature.inputs, *(each for each in signature.overridable if each.name in wanted)]
    inputs = [
        checker.merged(each, configuration.inputs, "input", is_optional=each.name in optional) for each in own
    ]
    checker.check_names("input", configuration.inputs, own)
    checker.check_names("output", configuration.outputs, signature.outputs)
    outputs = [
        checker.merged(each, configuration.outputs, "output")
        for each in signature.outputs
        if not named or each.name in named
    ]
    config = _whole(name, filename, configuration, source.plain)
    config["input"] = [_input(each, configuration.max_batch_size) for each in inputs]
    config["output"] = [
        _output(each, configuration.max_batch_size, source.get("output", default=[])) for each in outputs
    ]
    return Completed(tuple(inputs), tuple(outputs), config)


class _Checker:
    """Compares what a configuration declares with what the model has."""

    def __init__(self, source: Source, batch: int) -> None:
        self._source = source
        self._batch = batch

    def check_batch(self, tensors: Sequence[TensorInfo]) -> None:
        if not self._batch:
            return
        for each in tensors:
            if each.is_unranked:
                continue
            if not each.shape or each.shape[0] != -1:
                self._source.refuse(
                    ("max_batch_size",),
                    f"tensor '{each.name}': for the model to support batching the shape should have at least "
                    f"1 dimension and the first dimension must be -1; but shape expected by the model is "
                    f"{list(each.shape)}. Set max_batch_size to 0",
                )

    def check_names(self, role: str, declared: Sequence[Declared], own: Sequence[TensorInfo]) -> None:
        known = [each.name for each in own]
        for each in declared:
            if each.name not in known:
                allowed = ", ".join(known)[:400]
                text = f"unexpected inference {role} '{each.name[:80]}', allowed {role}s are: {allowed}"
                self._source.refuse((*each.path, "name"), text)
        if role == "input" and declared:
            missing = [each for each in own if each.name not in {item.name for item in declared}]
            needed = [each.name for each in missing if not each.is_optional]
            if needed:
                text = f"the model has inputs that the configuration lacks: {', '.join(needed)[:400]}"
                self._source.refuse((role,), text)

    def merged(
        self, own: TensorInfo, declared: Iterable[Declared], role: str, *, is_optional: bool = False
    ) -> TensorInfo:
        """A tensor of the model, with the sizes that the configuration fixes."""
        given = next((each for each in declared if each.name == own.name), None)
        if given is None:
            return own
        if given.datatype and given.datatype != own.datatype:
            self._source.refuse(
                (*given.path, "data_type"),
                f"{role} '{own.name}' is {own.datatype} in the model, {given.datatype} in the configuration",
            )
        may_lack = own.is_optional or (is_optional and given.is_optional)
        if given.is_optional and not may_lack:
            text = f"input '{own.name}' has no default in the model, so it is not optional"
            self._source.refuse((*given.path, "optional"), text)
        if given.dims is None:
            return TensorInfo(own.name, own.datatype, own.shape, may_lack, own.is_unranked)
        shape = ((-1,) if self._batch else ()) + given.dims
        if not own.is_unranked and not _fits(own.shape, shape):
            self._refuse_shape(own, given, shape, role)
        return TensorInfo(own.name, own.datatype, shape, may_lack)

    def _refuse_shape(self, own: TensorInfo, given: Declared, shape: tuple[int, ...], role: str) -> NoReturn:
        expected, specified = f"shape {list(own.shape)}", f"shape {list(shape)}"
        if len(shape) != len(own.shape):
            expected = f"{len(own.shape)} dimensions ({expected})"
            specified = f"{len(shape)} dimensions ({specified})"
        text = f"the model expects {expected} but the configuration specifies {specified}"
        self._source.refuse((*given.path, "dims"), f"{role} '{own.name}': {text}")


def _fits(own: tuple[int, ...], given: tuple[int, ...]) -> bool:
    """True if a shape is one of those that the model takes.  A scalar may be declared as [1], as Triton has
    no other way to write it."""
    if not own and given == (1,):
        return True
    return len(own) == len(given) and all(size in (-1, other) for size, other in zip(own, given, strict=True))


def _whole(name: str, filename: str, configuration: Configuration, given: dict[str, Any]) -> dict[str, Any]:
    optimization = given.get("optimization", {})
    found: dict[str, Any] = {
        "name": name,
        "platform": PLATFORM,
        "backend": BACKEND,
        "runtime": given.get("runtime", ""),
        "version_policy": configuration.policy,
        "max_batch_size": configuration.max_batch_size,
        "input": [],
        "output": [],
        "batch_input": [],
        "batch_output": [],
        "optimization": {
            **optimization,
            "priority": optimization.get("priority", "PRIORITY_DEFAULT"),
            "input_pinned_memory": {"enable": True, **optimization.get("input_pinned_memory", {})},
            "output_pinned_memory": {"enable": True, **optimization.get("output_pinned_memory", {})},
            "gather_kernel_buffer_threshold": optimization.get("gather_kernel_buffer_threshold", 0),
            "eager_batching": optimization.get("eager_batching", False),
        },
        "instance_group": _groups(name, given.get("instance_group", [])),
        "default_model_filename": filename,
        "cc_model_filenames": {},
        "metric_tags": given.get("metric_tags", {}),
        "parameters": {
            key: {"string_value": value.get("string_value", "")}
            for key, value in given.get("parameters", {}).items()
        },
        "model_warmup": [
            {"name": "", "batch_size": 0, "count": 0, **each} for each in given.get("model_warmup", [])
        ],
        "model_transaction_policy": {"decoupled": False},
    }
    more = ("dynamic_batching", "response_cache", "model_metrics")
    return found | {key: given[key] for key in more if key in given}


def _groups(name: str, given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups = given or [{"kind": "KIND_AUTO", "count": 1}]
    return [
        {
            "name": each.get("name") or f"{name}_{index}",
            "kind": each.get("kind", "KIND_AUTO"),
            "count": each.get("count") or 1,
            "gpus": each.get("gpus", []),
            "secondary_devices": each.get("secondary_devices", []),
            "profile": each.get("profile", []),
            "passive": each.get("passive", False),
            "host_policy": each.get("host_policy", ""),
            **({"rate_limiter": each["rate_limiter"]} if "rate_limiter" in each else {}),
        }
        for index, each in enumerate(groups)
    ]


def _input(tensor: TensorInfo, batch: int) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "data_type": _type(tensor),
        "format": "FORMAT_NONE",
        "dims": _dims(tensor, batch),
        "is_shape_tensor": False,
        "allow_ragged_batch": False,
        "optional": tensor.is_optional,
        "is_non_linear_format_io": False,
    }


def _output(tensor: TensorInfo, batch: int, given: list[dict[str, Any]]) -> dict[str, Any]:
    labels = next((each.get("label_filename", "") for each in given if each.get("name") == tensor.name), "")
    return {
        "name": tensor.name,
        "data_type": _type(tensor),
        "dims": _dims(tensor, batch),
        "label_filename": labels,
        "is_shape_tensor": False,
        "is_non_linear_format_io": False,
    }


def _type(tensor: TensorInfo) -> str:
    return f"TYPE_{'STRING' if tensor.datatype == 'BYTES' else tensor.datatype}"


def _dims(tensor: TensorInfo, batch: int) -> list[int]:
    """Sizes without the batch."""
    return list(tensor.shape[1:] if batch and tensor.shape else tensor.shape)
