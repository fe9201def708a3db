"""The template ends when no proxy is left, and the next load starts another one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import psutil
import pytest

import onnx_dl
from onnx_dl import InferenceSessionProxy, ModelHost
from tests.support.sharing import Kept, own_runtime
from tests.support.slow import identity_model
from tests.support.waiting import eventually, is_gone, is_process, template_of

X = np.ones(1, np.float32)


@pytest.fixture(params=["private", "shared"])
def hasty(
    request: pytest.FixtureRequest, nothing_is_left_behind: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModelHost]:
    """A host whose template ends as soon as it is not needed."""
    monkeypatch.setenv("ONNX_DL_TEMPLATE_TTL", "0")
    if request.param == "private":
        with ModelHost() as host:
            yield host
        return
    with own_runtime(monkeypatch):
        kept = Kept("mine")
        try:
            with onnx_dl.connect("mine") as host:
                yield host
        finally:
            kept.end()


def _templates(host: ModelHost) -> list[psutil.Process]:
    children = psutil.Process(host.snapshot().supervisor_pid).children()
    return [child for child in children if is_process(child, "template")]


def test_it_stays_while_a_proxy_lives_and_the_next_load_starts_another(hasty: ModelHost) -> None:
    eventually(lambda: not _templates(hasty), "the end of a template that nobody needs")
    proxy = InferenceSessionProxy(identity_model(), host=hasty)
    assert proxy.run(None, {"x": X})[0] == X
    template = template_of(hasty).pid
    proxy.unload()
    assert proxy.run(None, {"x": X})[0] == X
    proxy.unload()
    assert template_of(hasty).pid == template, "a proxy that lives may load again"
    proxy.close()
    eventually(lambda: is_gone(template) and not _templates(hasty), "the end of the template")
    with InferenceSessionProxy(identity_model(), host=hasty) as proxy:
        assert proxy.run(None, {"x": X})[0] == X
        assert template_of(hasty).pid != template
