"""Variables that one model's worker has from its start."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnx_dl
from onnx_dl import ConfigError, InferenceSessionProxy, ModelHost, WorkerDied, connect
from onnx_dl.cli.main import main
from tests.contract.test_constructor_contract import CONFIG, in_force, with_config
from tests.support.sharing import own_runtime
from tests.support.slow import identity_model
from tests.support.waiting import DEADLINE, allowed, worker_pid

CPU = ["CPUExecutionProvider"]
SECRET = "swordfish-7211"
SET = {"OMP_NUM_THREADS": "3", "LD_LIBRARY_PATH": "/nowhere/lib", "TOKEN": SECRET, "LANG": None}
X = {"x": np.ones(2, np.float32)}


def environ(pid: int) -> dict[str, str]:
    """As its interpreter found it."""
    found = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in found if pair)


def proxy_with(host: ModelHost, variables: dict[str, str | None] | None, **how: Any) -> InferenceSessionProxy:
    return InferenceSessionProxy(identity_model(), providers=CPU, host=host, environment=variables, **how)


@pytest.fixture(params=["fork", "exec"])
def started(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("ONNX_DL_START", request.param)
    monkeypatch.setenv("LANG", "C.UTF-8")
    with ModelHost() as host:
        yield host


def test_the_worker_has_it_from_its_start(started: ModelHost) -> None:
    with proxy_with(started, SET) as proxy:
        assert proxy.run(None, X)[0].tolist() == [1.0, 1.0]
        found = environ(worker_pid(started))
        assert {name: found.get(name) for name in SET} == SET
        assert found["PATH"] == os.environ["PATH"]


def test_it_is_part_of_the_key(host: ModelHost) -> None:
    """The same twice shares a worker; another, and none, has its own."""
    proxies = [
        proxy_with(host, variables) for variables in (SET, dict(SET), {"OMP_NUM_THREADS": "4"}, None, {})
    ]
    for proxy in proxies:
        proxy.load()
    pids = [status.pid for status in host.snapshot().models]
    found = sorted(environ(pid).get("OMP_NUM_THREADS", "") for pid in pids if pid)
    assert found == sorted(["3", "4", os.environ.get("OMP_NUM_THREADS", "")])
    del proxies, proxy


def test_what_is_read_with_each_load(host: ModelHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own counts more than what the application has now."""
    monkeypatch.setenv("ORT_LOAD_CONFIG_FROM_MODEL", "0")
    own, source = {"ORT_LOAD_CONFIG_FROM_MODEL": "1"}, with_config(CONFIG)
    with InferenceSessionProxy(source, providers=CPU, host=host, environment=own) as proxy:
        assert in_force(proxy) == (3, 2, "ORT_PARALLEL")
        assert proxy._read_config_from_model


def test_a_copy_has_it(host: ModelHost) -> None:
    with proxy_with(host, {"A": "b"}) as proxy, pickle.loads(pickle.dumps(proxy)) as copy:
        assert copy._handle.spec.key == proxy._handle.spec.key
        assert copy._handle.spec.environment.variables == {"A": "b"}
        onnx_dl.default_host().close()


def test_a_group_has_a_worker_for_each(host: ModelHost) -> None:
    first = proxy_with(host, {"A": "1"}, group="g")
    second = InferenceSessionProxy(identity_model(), host=host, group="g", environment={"A": "1"}, max_runs=9)
    third = proxy_with(host, None, group="g")
    for proxy in (first, second, third):
        proxy.load()
    models = {status.model: len(status.members) for status in host.snapshot().models}
    assert sorted(models.values()) == [1, 2]
    assert models["group:g"] == 1
    assert not any("A" in name.partition("#")[2] for name in models)
    del first, second, third, proxy


def test_an_interpreter_that_cannot_start(host: ModelHost) -> None:
    """What it says is in the error."""
    with proxy_with(host, {"PYTHONHOME": "/nowhere"}) as proxy, pytest.raises(WorkerDied) as caught:
        proxy.load()
    assert "No module named 'encodings'" in caught.value.stderr


def test_secrets_are_not_shown(host: ModelHost, capfd: pytest.CaptureFixture[str]) -> None:
    shown: list[str] = []
    with host.events() as events, proxy_with(host, {"TOKEN": SECRET}) as proxy:
        proxy.load()
        shown += [repr(proxy), repr(proxy._handle.spec), repr(host.snapshot())]
        proxy.unload()
        while not (shown and "unloaded" in shown[-1]):
            shown.append(repr(events.get(allowed(DEADLINE))))
    assert SECRET not in "".join(shown)
    assert "TOKEN" in repr(proxy._handle.spec)
    assert SECRET not in "".join(capfd.readouterr())


def test_a_setting_of_ours_is_refused() -> None:
    with pytest.raises(ConfigError, match="ONNX_DL_CACHE is a setting of onnx-dl"):
        InferenceSessionProxy(identity_model(), environment={"ONNX_DL_CACHE": "off"})


def test_patch_passes_it_on(host: ModelHost) -> None:
    import onnxruntime

    with onnx_dl.patch(host=host, environment={"A": "1"}, models={"*": {"environment": {"A": "2"}}}):
        session = onnxruntime.InferenceSession(identity_model(), providers=CPU)
    assert environ(worker_pid(host))["A"] == "2"
    del session


def test_commands_and_the_hosts_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "identity.onnx"
    path.write_bytes(identity_model())
    file = tmp_path / "host.toml"
    file.write_text(f'[models.id]\npath = "{path}"\nenvironment = {{ A = "file" }}\n')
    with own_runtime(monkeypatch):
        monkeypatch.setenv("ONNX_DL_CONFIG", str(file))
        for arguments in (["id"], [str(path), "--env", "A=command", "--env", "B=2"]):
            assert main(["load", *arguments]) == 0
        host = connect()
        found = [environ(status.pid) for status in host.snapshot().models if status.pid]
        assert sorted((each["A"], each.get("B")) for each in found) == [("command", "2"), ("file", None)]
        host.stop()
