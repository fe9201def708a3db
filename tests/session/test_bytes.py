"""A model that is given as bytes: kept once, in shared memory, and the same model as in-process."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
import pytest
from onnx import numpy_helper

import onnx_dl
from onnx_dl import InferenceSessionProxy, ModelHost
from onnx_dl.errors import ProxyClosedError
from tests.contract.both import CPU, F, model, node, tensor
from tests.contract.test_options_contract import external
from tests.session.test_odd_files import told
from tests.support.programs import program
from tests.support.waiting import eventually, worker_pid
from tests.unit.workers.load_cache.test_store import nested

X: Final = np.ones((1, 1024), np.float32)


class Given(bytes):
    """Bytes that tell of their end."""

    def __new__(cls, data: bytes, gone: list[str]) -> Given:
        made = super().__new__(cls, data)
        made.gone = gone
        return made

    def __del__(self) -> None:
        self.gone.append("gone")


def large(parts: int, rows: int = 1024) -> bytes:
    """A sum of products, with 4 KiB of weights for each row of each part."""
    random = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(random.standard_normal((1024, rows), np.float32), f"w{part}")
        for part in range(parts)
    ]
    products = [node("MatMul", ["x", f"w{part}"], [f"p{part}"]) for part in range(parts)]
    total = node("Sum", [f"p{part}" for part in range(parts)], ["y"])
    return model([*products, total], [tensor("x", F, [1, 1024])], [tensor("y", F, [1, rows])], weights)


def segments() -> dict[int, int]:
    """Bytes of the shared memory that this process has descriptors of, by inode."""
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{fd}"
        try:
            if "memfd:onnx-dl" in os.readlink(path):
                about = os.stat(path)
                found[about.st_ino] = about.st_size
        except FileNotFoundError:  # the listing's own
            continue
    return found


def in_process(source: bytes) -> Any:
    return onnxruntime.InferenceSession(source, providers=CPU)


def same(proxy: Any, session: Any) -> bool:
    (ours,), (theirs,) = proxy.run(None, {"x": X}), session.run(None, {"x": X})
    return bool(ours.tobytes() == theirs.tobytes())


# --- whose memory it is ------------------------------------------------------------------------------------


def test_the_caller_may_let_go_of_them(host: ModelHost) -> None:
    """At once, before anything is loaded; every load is from the one copy."""
    gone: list[str] = []
    source = Given(large(2), gone)
    session, size = in_process(bytes(bytearray(source))), len(source)
    before = segments()
    proxy = InferenceSessionProxy(source, providers=CPU, host=host)
    del source
    assert gone
    assert same(proxy, session)
    proxy.unload()
    assert same(proxy, session)
    assert [segments()[new] for new in segments().keys() - before.keys()].count(size) == 1


def test_a_patched_session_does_not_keep_them(host: ModelHost) -> None:
    gone: list[str] = []
    source = Given(large(1), gone)
    session = in_process(bytes(bytearray(source)))
    with onnx_dl.patch(host=host):
        patched = in_process(source)
    del source
    assert gone
    assert same(patched, session)


def test_those_who_have_the_same_share_one_copy(host: ModelHost) -> None:
    source = large(1)
    before = segments()
    proxies = [InferenceSessionProxy(bytes(bytearray(source)), providers=CPU, host=host) for _ in range(3)]
    proxies += [copy.copy(proxies[0]), pickle.loads(pickle.dumps(proxies[0]))]
    assert list(segments().keys() - before.keys()) != [] and len(segments()) == len(before) + 1
    assert all(proxy._model_bytes == source for proxy in proxies)


def test_close_gives_it_back(host: ModelHost) -> None:
    """Also where the closed proxy lives on, and in the host when the model has left."""
    before = set(segments())
    proxy = InferenceSessionProxy(large(1), providers=CPU, host=host)
    other = InferenceSessionProxy(large(1), providers=CPU, host=host)
    proxy.run(None, {"x": X})
    (inode,) = set(segments()) - before - {s for s, size in segments().items() if size != len(large(1))}
    worker, supervisor = worker_pid(host), host.snapshot().supervisor_pid
    proxy.close()
    assert inode in segments()  # the other one has it
    other.run(None, {"x": X})
    other.close()
    for act in (copy.copy, pickle.dumps, lambda p: p.run(None, {"x": X}), lambda p: p._model_bytes):
        with pytest.raises(ProxyClosedError):
            act(proxy)
    assert inode not in segments()
    eventually(lambda: not os.path.exists(f"/proc/{worker}"), "the end of the worker")
    eventually(lambda: not _holds(supervisor, inode), "the end of the memory in the host")


def _holds(pid: int, inode: int) -> bool:
    folder = f"/proc/{pid}/fd"
    for fd in os.listdir(folder):
        try:
            if os.stat(f"{folder}/{fd}").st_ino == inode:
                return True
        except FileNotFoundError:
            continue
    return False


def test_more_models_than_descriptors(host: ModelHost) -> None:
    """Few of them keep one; the others' memory is there all the same."""
    source = large(1, 4)
    before = len(os.listdir("/proc/self/fd"))
    models = [source + b"\x2a\x02\x18" + bytes([number]) for number in range(100)]  # version numbers
    proxies = [InferenceSessionProxy(each, providers=CPU, host=host) for each in models]
    assert len(os.listdir("/proc/self/fd")) < before + 70
    assert same(proxies[0], in_process(source)) and same(proxies[-1], in_process(source))
    assert all(proxy._model_bytes == each for proxy, each in zip(proxies, models, strict=True))


# --- in other processes ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_after_the_program_closed_all_descriptors() -> None:
    program(
        """
os.closerange(3, 4096)
files = [os.open("/dev/zero", os.O_RDONLY) for _ in range(30)]
assert (run(x) == x).all()
proxy.unload()
assert (run(x) == x).all() and proxy._model_bytes == identity_model()
assert all(os.read(file, 1) == b"\\0" for file in files)
"""
    )


@pytest.mark.slow
@pytest.mark.parametrize("used", [True, False])
def test_in_a_forked_child(used: bool) -> None:
    """It has the memory of its parent, whatever the parent does with its own."""
    program(
        f"""
if {used}:
    run(x)
r, w = os.pipe()
pid = os.fork()
if not pid:
    os.read(r, 1)
    assert (run(x) == x).all() and proxy._model_bytes == identity_model()
    default_host().close()
    os._exit(0)
proxy.close()
del proxy
gc.collect()
os.write(w, b"!")
assert os.waitpid(pid, 0)[1] == 0
"""
    )


# --- what it is read as ------------------------------------------------------------------------------------


def _optimized(folder: Path, source: bytes) -> bytes:
    """In onnxruntime's own format."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "m.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(source, options, providers=CPU)
    return (folder / "m.ort").read_bytes()


WRONG: Final[dict[str, Callable[[], bytes]]] = {
    "empty": bytes,
    "nonsense": lambda: b"not a model at all",
    "zeros": lambda: bytes(1 << 20),
    "deep": lambda: nested(300),
    "cut off": lambda: large(1, 4)[:-50],
    "external data": lambda: external()[0],
    "external data elsewhere": lambda: external("/nowhere/w.bin")[0],
    "no such operator": lambda: model([node("Nothing", ["x"], ["y"])], [tensor("x")], [tensor("y")]),
    "no such type": lambda: model([node("Not", ["x"], ["y"])], [tensor("x")], [tensor("y")]),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_said_in_the_same_words(host: ModelHost, kind: str) -> None:
    source = WRONG[kind]()
    expected = told(lambda: in_process(source))
    assert told(lambda: InferenceSessionProxy(source, providers=CPU, host=host, eager=True)) == expected


def test_onnxruntimes_own_format(host: ModelHost, tmp_path: Path) -> None:
    source = large(1, 8)
    saved = _optimized(tmp_path, source)
    assert same(InferenceSessionProxy(saved, providers=CPU, host=host), in_process(saved))


def test_external_data_lies_where_it_does_for_bytes(host: ModelHost, tmp_path: Path) -> None:
    source, raw = external()
    (tmp_path / "w.bin").write_bytes(raw)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(tmp_path))
    feed = {"x": np.ones(3, np.float32)}
    expected = onnxruntime.InferenceSession(source, options, providers=CPU).run(None, feed)[0]
    proxy = InferenceSessionProxy(source, options, providers=CPU, host=host)
    assert proxy.run(None, feed)[0].tobytes() == expected.tobytes()


# --- how much it takes -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_copy_is_made_of_them(tmp_path: Path) -> None:
    """The application has them once while it gives them, and then no more.  The worker has the model as from
    a file, and one part of it twice while it is read.  Copied, it would have it three times, and be ended."""
    path = tmp_path / "m.onnx"
    path.write_bytes(large(8, 3 << 10))
    program(
        f"""
from onnx_dl import ModelHost
def told(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))
proxy.load()  # what everything else takes
default_host().close()
open("/proc/self/clear_refs", "w").write("5")
before = told("VmRSS")
data = open({str(path)!r}, "rb").read()
size = len(data)
with ModelHost(memory_limit=2 * size) as host:
    proxy = InferenceSessionProxy(data, providers=["CPUExecutionProvider"], host=host)
    del data
    proxy.run(None, {{"x": np.ones((1, 1024), np.float32)}})
    assert told("VmHWM") - before < 1.3 * size, (told("VmHWM") - before) / size
    assert told("RssAnon") + told("RssFile") - before < 0.3 * size, told("RssAnon") / size
"""
    )
