"""The compiled definitions: made from the text beside them, like Triton's, and apart from all others."""

from __future__ import annotations

import importlib.resources
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

import onnx_dl.server.grpc
from onnx_dl.server.grpc import messages

FOLDER = Path(onnx_dl.server.grpc.__file__).parent


def compiled() -> descriptor_pb2.FileDescriptorSet:
    data = importlib.resources.files("onnx_dl.server.grpc").joinpath(messages.COMPILED).read_bytes()
    return descriptor_pb2.FileDescriptorSet.FromString(data)


def test_the_compiled_definitions_are_those_of_the_text(tmp_path: Path) -> None:
    """If this fails: in the folder of the files,

    python -m grpc_tools.protoc -I. --include_imports --descriptor_set_out=open_inference.desc \
        health.proto open_inference.proto
    """
    protoc = pytest.importorskip("grpc_tools.protoc")
    target = tmp_path / "compiled"
    arguments = ["-I", str(FOLDER), "--include_imports", f"--descriptor_set_out={target}"]
    assert protoc.main(["protoc", *arguments, "health.proto", "open_inference.proto"]) == 0
    assert descriptor_pb2.FileDescriptorSet.FromString(target.read_bytes()) == compiled()


def test_names_and_numbers_are_those_of_tritons_clients() -> None:
    service_pb2 = pytest.importorskip("tritonclient.grpc.service_pb2")
    model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    ours = {file.name: file for file in compiled().file}
    for name, module in (("open_inference.proto", service_pb2), ("model_config.proto", model_config_pb2)):
        theirs = descriptor_pb2.FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(theirs)
        assert fields(ours[name]) == fields(theirs)
        assert methods(ours[name]) == methods(theirs)


def fields(file: descriptor_pb2.FileDescriptorProto) -> dict[str, tuple[object, ...]]:
    """All fields and values of enumerations by their full names."""
    found: dict[str, tuple[object, ...]] = {}

    def note(prefix: str, messages: object, enums: object) -> None:
        for enum in enums:  # type: ignore[attr-defined]
            for value in enum.value:
                found[f"{prefix}{enum.name}.{value.name}"] = (value.number,)
        for each in messages:  # type: ignore[attr-defined]
            for field in each.field:
                kind = (field.number, field.type, field.label, field.type_name, field.HasField("oneof_index"))
                found[f"{prefix}{each.name}.{field.name}"] = kind
            note(f"{prefix}{each.name}.", each.nested_type, each.enum_type)

    note("", file.message_type, file.enum_type)
    return found


def methods(file: descriptor_pb2.FileDescriptorProto) -> set[tuple[object, ...]]:
    return {
        (each.name, each.input_type, each.output_type, each.client_streaming, each.server_streaming)
        for service in file.service
        for each in service.method
    }


@pytest.mark.parametrize("first", ["onnx_dl.server.grpc.listener", "tritonclient.grpc"])
def test_tritons_client_can_be_imported_beside_ours(first: str) -> None:
    pytest.importorskip("tritonclient.grpc")
    program = f"import {first}, tritonclient.grpc, onnx_dl.server.grpc.listener as ours; print('both')"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.stdout == "both\n", ended.stderr


def test_notices_of_both_projects_are_beside_the_definitions() -> None:
    licenses = (FOLDER / "LICENSES.txt").read_text()
    for words in ("The KServe Authors", "NVIDIA CORPORATION", "Apache License", "BSD 3-Clause"):
        assert words in licenses
    for name in ("open_inference.proto", "model_config.proto", "health.proto"):
        assert "LICENSES.txt" in (FOLDER / name).read_text()
