"""The files in examples/serving: manifests fit their schemas, and commands their parser."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from onnx_dl.cli import grammar
from onnx_dl.cli.serve import options_of
from onnx_dl.server.app import MOST_CLOSING
from onnx_dl.server.auth import start
from onnx_dl.server.options import ServeOptions

jsonschema = pytest.importorskip("jsonschema", reason="needs the packages of the extra dev")
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs the packages of the extra dev")
yaml = pytest.importorskip("yaml", reason="needs the packages of the extra dev")

ROOT = Path(__file__).parents[2]
FILES = ROOT / "examples" / "serving"
KSERVE = json.loads((ROOT / "tests" / "project" / "kserve" / "schemas.json").read_text())
KUBERNETES = list(yaml.safe_load_all((FILES / "kubernetes.yaml").read_text()))
KSERVE_OBJECTS = list(yaml.safe_load_all((FILES / "kserve.yaml").read_text()))
DOCKERFILE = (FILES / "Dockerfile").read_text().replace("\\\n", " ")
UNIT = (FILES / "onnx-dl-serve.service").read_text()
POD_DEFAULT = 30
"""Seconds that a pod has after SIGTERM, if it says nothing."""
OLDEST, NEWEST = "1.30", kubernetes_validate.latest_version().rpartition(".")[0]
"""Of Kubernetes: the oldest one that kubernetes.yaml names, and the newest one with a schema here."""


def named(objects: list[Any], kind: str) -> dict[str, Any]:
    (found,) = [each for each in objects if each["kind"] == kind]
    return dict(found)


POD = named(KUBERNETES, "Deployment")["spec"]["template"]["spec"]
RUNTIME = named(KSERVE_OBJECTS, "ClusterServingRuntime")
INSTRUCTIONS = dict(
    re.findall(r"^(CMD|ENTRYPOINT|USER|EXPOSE|HEALTHCHECK)\s+(.*)$", DOCKERFILE, re.MULTILINE)
)


def unit_command() -> list[str]:
    (found,) = re.findall(r"^ExecStart=(.*)$", UNIT.replace("\\\n", " "), re.MULTILINE)
    return shlex.split(found)


COMMANDS = {
    "Dockerfile": json.loads(INSTRUCTIONS["ENTRYPOINT"])[1:] + json.loads(INSTRUCTIONS["CMD"]),
    "kubernetes.yaml": ["serve", *POD["containers"][0]["args"]],
    "kserve.yaml": ["serve", *RUNTIME["spec"]["containers"][0]["args"]],
    "onnx-dl-serve.service": unit_command()[1:],
}


def options(name: str) -> ServeOptions:
    """The options of a file's command, refused as by the program.  Its folders are taken for granted."""
    given = vars(grammar.parser().parse_args(COMMANDS[name]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.path.isdir", lambda path: True)
        return options_of({option: value for option, value in given.items() if value is not None})


def ports(found: ServeOptions) -> dict[str, int]:
    served = {"http": found.http, "grpc": found.grpc, "metrics": found.metrics}
    return {name: int(address.rpartition(":")[2]) for name, address in served.items() if address}


def strict(schema: Any) -> Any:
    """The schema of a custom resource that also refuses fields that it does not know."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    if isinstance(found.get("properties"), dict) and found.get("type") == "object":
        found["additionalProperties"] = False
    return found


def check_kserve(found: dict[str, Any]) -> None:
    schema = strict(KSERVE[found["kind"]])
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(found, schema, cls=jsonschema.Draft202012Validator)


def check_kubernetes(found: dict[str, Any]) -> None:
    for version in (OLDEST, NEWEST):
        kubernetes_validate.validate(found, version, strict=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_understood_and_the_server_may_start(name: str) -> None:
    assert start.refusal(options(name)) is None


@pytest.mark.parametrize("found", KUBERNETES, ids=lambda found: found["kind"])
def test_kubernetes_knows_the_objects(found: dict[str, Any]) -> None:
    check_kubernetes(found)


@pytest.mark.parametrize("found", KSERVE_OBJECTS, ids=lambda found: found["metadata"]["name"])
def test_kserve_knows_the_objects(found: dict[str, Any]) -> None:
    check_kserve(found)


def test_kubernetes_knows_the_containers_of_kserves_runtime() -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}}
    check_kubernetes({**pod, "spec": {"containers": RUNTIME["spec"]["containers"]}})


def test_a_mistake_is_seen() -> None:
    wrong = copy.deepcopy(RUNTIME)
    wrong["spec"]["protocolVersion"] = wrong["spec"].pop("protocolVersions")
    with pytest.raises(jsonschema.ValidationError, match="protocolVersion"):
        check_kserve(wrong)
    wrong = copy.deepcopy(KUBERNETES[0])
    wrong["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        check_kubernetes(wrong)


def test_ports_agree() -> None:
    container = POD["containers"][0]
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == ports(
        options("kubernetes.yaml")
    )
    service = named(KUBERNETES, "Service")["spec"]
    assert {port["targetPort"]: port["port"] for port in service["ports"]} == ports(
        options("kubernetes.yaml")
    )
    assert service["selector"].items() <= KUBERNETES[0]["spec"]["template"]["metadata"]["labels"].items()
    assert sorted(map(int, INSTRUCTIONS["EXPOSE"].split())) == sorted(ports(options("Dockerfile")).values())
    assert f":{ports(options('Dockerfile'))['http']}/v2/health/ready" in INSTRUCTIONS["HEALTHCHECK"]


def test_ports_of_kserve_agree() -> None:
    """KServe expects HTTP at 8080 if no port is named; a port named h2c is gRPC."""
    served = ports(options("kserve.yaml"))
    assert served["http"] == 8080
    container = RUNTIME["spec"]["containers"][0]
    for probe in ("livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] == served["http"]
    assert RUNTIME["spec"]["annotations"]["prometheus.kserve.io/port"] == str(served["http"])
    for found in KSERVE_OBJECTS[1:]:
        model = found["spec"]["predictor"]["model"]
        assert model["runtime"] == RUNTIME["metadata"]["name"]
        assert model["protocolVersion"] in RUNTIME["spec"]["protocolVersions"]
        assert [port["containerPort"] for port in model.get("ports", [])] == (
            [served["grpc"]] if model["protocolVersion"] == "grpc-v2" else []
        )


@pytest.mark.parametrize("name", ["kubernetes.yaml", "kserve.yaml", "onnx-dl-serve.service"])
def test_the_time_to_drain_is_given(name: str) -> None:
    """Nobody kills the server before it would end by itself, at the latest."""
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)
    sleep = POD["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    pods = [each["spec"]["predictor"] for each in KSERVE_OBJECTS[1:]]
    given = {
        "kubernetes.yaml": POD["terminationGracePeriodSeconds"] - sleep,
        "kserve.yaml": min(pod.get("terminationGracePeriodSeconds", POD_DEFAULT) for pod in pods),
        "onnx-dl-serve.service": int(stop),
    }
    assert given[name] >= options(name).drain_timeout + MOST_CLOSING


def test_systemd_lets_the_server_end_its_workers() -> None:
    assert "\nKillMode=mixed\n" in UNIT


def test_nothing_runs_as_root() -> None:
    assert INSTRUCTIONS["USER"] == "1000:1000"
    assert POD["securityContext"]["runAsNonRoot"] and POD["securityContext"]["runAsUser"]
    for container in (*POD["containers"], *RUNTIME["spec"]["containers"]):
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert "DynamicUser=yes" in UNIT and "NoNewPrivileges=yes" in UNIT


def test_the_mounts_of_the_pod_have_volumes_and_the_options_lie_on_them() -> None:
    mounts = {mount["name"]: mount["mountPath"] for mount in POD["containers"][0]["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in POD["volumes"]}
    found = options("kubernetes.yaml")
    places = [*found.repository, found.token_file, *(each["value"] for each in POD["containers"][0]["env"])]
    assert [place for place in places if not place.startswith(tuple(mounts.values()))] == []


def test_the_image_has_what_it_copies_and_a_base_with_a_name() -> None:
    copied = [
        line.split()[1:-1]
        for line in DOCKERFILE.splitlines()
        if line.startswith("COPY") and "--from" not in line
    ]
    assert copied and [path for paths in copied for path in paths if not (ROOT / path).exists()] == []
    ignored = (FILES / "Dockerfile.dockerignore").read_text().splitlines()
    assert {f"!{path}" for paths in copied for path in paths} == {line for line in ignored if line[:1] == "!"}
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert bases == ["python:${PYTHON}"] * 2 and "ARG PYTHON=3.12-slim-bookworm\n" in DOCKERFILE


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    path = tmp_path / "onnx-dl-serve.service"
    path.write_text(UNIT.replace(unit_command()[0], shutil.which("true") or ""))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    told = [line for line in done.stderr.splitlines() if path.name in line]
    assert told == [] and done.returncode == 0, done.stderr
