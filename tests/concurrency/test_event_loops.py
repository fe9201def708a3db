"""Coroutines on asyncio, uvloop and trio, and calls of other kinds on the lanes that those have used."""

from __future__ import annotations

import pytest

from tests.support.programs import program

pytestmark = pytest.mark.slow

MIXED = """
import asyncio, onnxruntime
from onnx_dl import RunTimeout
from tests.contract.both import CPU, loop
from tests.contract.test_async_contract import ENDLESS
quick = InferenceSessionProxy(identity_model(), providers=CPU, latency="low")
small = {"x": np.ones(4, np.float32)}

async def both(proxy):
    for _ in range(3):
        assert (await proxy.arun(None, small))[0][0] == 1
        assert proxy.run(None, small)[0][0] == 1
        assert proxy.run(None, small, timeout=60)[0][0] == 1
    heard = asyncio.Event()
    tell = asyncio.get_running_loop().call_soon_threadsafe
    proxy.run_async(None, small, lambda *result: tell(heard.set), None)
    await heard.wait()
    calls = [proxy.arun(None, small) for _ in range(40)]
    assert len(await asyncio.gather(*calls)) == 40

for proxy in (proxy, quick):
    for _ in range(2):  # the first loop is closed in between
        new_loop(both(proxy))
threads = [threading.Thread(target=new_loop, args=(both(proxy),)) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()

options = onnxruntime.SessionOptions()
options.log_severity_level = 4
endless = InferenceSessionProxy(loop(), options, providers=CPU)
async def late():
    await endless.aload()
    try:
        await endless.arun(None, ENDLESS, timeout=0.1)
    except RunTimeout:
        pass
    task = asyncio.ensure_future(endless.arun(None, ENDLESS))
    await asyncio.sleep(0.05)
    task.cancel()
new_loop(late())
assert proxy.run(None, small)[0][0] == 1
assert endless.unload(timeout=60)
"""


@pytest.mark.parametrize("lane", ["socket", "zmq"])
@pytest.mark.parametrize("library", ["asyncio", "uvloop"])
def test_coroutines_and_calls_on_the_same_lanes(
    library: str, lane: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(library)
    monkeypatch.setenv("ONNX_DL_LANE", lane)
    program(f"import {library}\nnew_loop = {library}.run\n{MIXED}")


TRIO = """
import onnxruntime, trio
from onnx_dl import RunTimeout
from tests.contract.both import CPU, loop
from tests.contract.test_async_contract import ENDLESS
small = {"x": np.ones(4, np.float32)}
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
endless = InferenceSessionProxy(loop(), options, providers=CPU)
answers = []

async def call(value):
    answers.append((await proxy.arun(None, {"x": np.full(4, value, np.float32)}))[0][0])

async def main():
    answers.clear()
    await call(1)  # which starts the host
    await proxy.aload()
    assert run(x)[5] == 5
    assert (await proxy.arun(None, {"x": x}))[0][5] == 5  # a large one is copied in a thread
    async with trio.open_nursery() as nursery:
        for value in range(100):
            nursery.start_soon(call, value)
    assert sorted(answers) == sorted([1, *range(100)])
    await endless.aload()
    try:
        await endless.arun(None, ENDLESS, timeout=0.1)
        raise AssertionError
    except RunTimeout:
        pass
    for _ in range(2):
        with trio.move_on_after(0.1) as scope:
            await endless.arun(None, ENDLESS)
        assert scope.cancelled_caught
    assert endless.unload(timeout=60)  # no run is left
    with trio.move_on_after(0.01) as scope:  # before or while it loads
        await endless.arun(None, ENDLESS)
    assert scope.cancelled_caught

for _ in range(2):
    trio.run(main)
assert run(x)[5] == 5
assert "asyncio" not in sys.modules
"""


@pytest.mark.parametrize("lane", ["socket", "zmq"])
def test_coroutines_of_trio(lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trio")
    monkeypatch.setenv("ONNX_DL_LANE", lane)
    program(TRIO)
