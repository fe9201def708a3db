"""The standby worker: loads that have it, and loads that do without."""

from __future__ import annotations

import contextlib

import psutil
import pytest

from onnx_dl import InferenceSessionProxy, ModelHost
from onnx_dl.demo.assets import model_path
from tests.support.waiting import eventually, is_gone, is_process, template_of, worker_pid


class Rig:
    """A host with one model, and the processes of its supervisor."""

    def __init__(self, host: ModelHost) -> None:
        self.host = host
        self.proxy = InferenceSessionProxy(model_path("digits"), host=host)
        self.proxy.load()

    def standby(self) -> psutil.Process:
        found: list[psutil.Process] = []

        def is_there() -> bool:
            children = psutil.Process(self.host.snapshot().supervisor_pid).children()
            found[:] = [child for child in children if is_process(child, "standby")]
            return len(found) == 1 and found[0].num_threads() > 1  # it is connected

        eventually(is_there, "a standby worker")
        return found[0]

    def reload(self) -> int:
        self.proxy.unload()
        self.proxy.load()
        return worker_pid(self.host)


@pytest.fixture
def rig(host: ModelHost) -> Rig:
    return Rig(host)


def test_a_load_has_its_process_and_there_is_another(rig: Rig) -> None:
    def has_it() -> bool:
        standby = rig.standby()  # which may not be prepared yet; then it stays for the next load
        assert standby.pid not in [model.pid for model in rig.host.snapshot().models]
        return rig.reload() == standby.pid and rig.standby() != standby

    eventually(has_it, "a load that has it, and another standby worker")


def test_one_that_is_dead_or_stopped_fails_no_load(rig: Rig) -> None:
    standby = rig.standby()
    standby.kill()
    assert rig.reload() != standby.pid
    standby = rig.standby()
    standby.suspend()
    assert rig.reload() != standby.pid
    with contextlib.suppress(psutil.NoSuchProcess):  # killed, if it was prepared
        standby.resume()


def test_a_model_with_an_environment_does_without(rig: Rig) -> None:
    standby = rig.standby()
    with InferenceSessionProxy(model_path("digits"), host=rig.host, environment={"A": "1"}) as proxy:
        proxy.load()
        assert standby.pid not in [model.pid for model in rig.host.snapshot().models]
        assert standby.is_running()


def test_it_ends_with_the_template_and_with_the_host(rig: Rig) -> None:
    standby = rig.standby()
    assert template_of(rig.host).cwd() == standby.cwd() == "/", "no directory of the application is in use"
    template_of(rig.host).kill()
    eventually(lambda: is_gone(standby.pid), "it ends with the template")
    rig.reload()
    standby = rig.standby()
    rig.host.close()
    eventually(lambda: is_gone(standby.pid), "it ends with the host")
