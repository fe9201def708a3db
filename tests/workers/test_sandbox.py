"""``sandbox=True``: what hostile code in a worker can no longer do, and that everything else goes on."""

from __future__ import annotations

import os
import platform
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import onnx_dl
from onnx_dl import EventType, ExecutionSession, InferenceSessionProxy, ModelHost, SandboxUnavailable
from onnx_dl.core import parsing
from onnx_dl.core.spec import ModelSpec, file_identity, model_key
from onnx_dl.core.terms import Terms
from onnx_dl.errors import ConfigError, PlatformError
from onnx_dl.session.model_source import ModelSource
from onnx_dl.session.proxy import ModelProxy
from onnx_dl.tensors.block import home_of
from onnx_dl.workers.sandbox import landlock, rights, seccomp, syscalls
from tests.support.slow import identity_model
from tests.support.waiting import eventually, is_gone, wait_for, worker_pid
from tests.workers.test_engines import SCALER, install

__all__ = ["install"]  # a fixture

CPU = ["CPUExecutionProvider"]
needs_kernel = pytest.mark.skipif(not landlock.version(), reason="this kernel has no Landlock")

# Each attempt is a Python expression or statement; ctypes makes any system call, as native code would.
HOSTILE = SCALER.replace(
    'if method == "crash":',
    """if method == "attempt":
            return self.attempt(*args)
        if method == "crash":""",
).replace(
    "    def close(self):",
    '''    def attempt(self, code):
        """The error that a thread of its own gets, by name; done: none."""
        import threading, traceback
        outcome = []
        def run():
            try:
                exec(code, {})
                outcome.append("done")
            except OSError as error:
                outcome.append(__import__("errno").errorcode.get(error.errno, repr(error)))
            except BaseException:
                outcome.append(traceback.format_exc())
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return outcome[0]

    def close(self):''',
)
SYSCALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
if libc.syscall(*[ctypes.c_long(a) for a in ({})]) < 0:
    raise OSError(ctypes.get_errno(), "refused")
"""


class Hostile(ModelProxy):
    """A model whose worker runs any code."""

    def __init__(self, path: Path, host: ModelHost, *, sandboxed: bool = True) -> None:
        spec = ModelSpec(
            key=model_key(file_identity(str(path)), "hostile", sandboxed),
            name=path.name,
            cwd=str(path.parent),
            engine="hostile",
            path=path.name,
            sandbox=sandboxed,
        )
        super().__init__(ModelSource(spec), Terms.parse(-1), host)

    def attempt(self, code: str) -> object:
        return self._handle.model().invoke(self._handle.lease, "attempt", code)


@pytest.fixture
def model(tmp_path: Path, install: Callable[[str, str], None]) -> Path:
    install("hostile", HOSTILE)
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "secret.txt").write_text("swordfish")
    (folder / "two.txt").write_text("2")
    return folder / "two.txt"


def attempts(model: Path, port: int) -> dict[str, str]:
    """What a hostile model may try, by what it is."""
    folder, me = str(model.parent), os.getpid()
    number = {**syscalls.forbidden(0), **syscalls.unknown(0), **syscalls.checked(0)}
    if platform.machine() == "aarch64":
        number = {**syscalls.forbidden(1), **syscalls.unknown(1), **syscalls.checked(1)}
    return {
        "a TCP socket": "import socket; socket.socket()",
        "a connection": f"import socket; socket.create_connection(('127.0.0.1', {port}))",
        "a Unix socket": "import socket; socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)",
        "a pair of sockets": "import socket; socket.socketpair()",
        "a new file": f"open({folder!r} + '/new', 'w')",
        "a file in /tmp": "open('/tmp/onnx-dl-was-here', 'w')",
        "its own model, written": f"open({str(model)!r}, 'r+')",
        "its own model, emptied": f"import os; os.truncate({str(model)!r}, 0)",
        "its own model, emptied while it is opened": (
            f"import os; os.open({str(model)!r}, os.O_RDONLY | os.O_TRUNC)"
        ),
        "its own model, through its descriptors": (
            f"import os; fd = os.open({str(model)!r}, 0); os.open('/proc/self/fd/' + str(fd), os.O_RDWR)"
        ),
        "a removed file": f"import os; os.unlink({str(model)!r})",
        "a mode": f"import os; os.chmod({folder!r}, 0o777)",
        "a time": f"import os; os.utime({str(model)!r})",
        "a file beside the model": f"open({folder!r} + '/secret.txt')",
        "the list of a folder": f"import os; os.listdir({folder!r})",
        "the user's home": "import os; os.listdir(os.path.expanduser('~'))",
        "the users": "open('/etc/passwd')",
        "the environment of the application": f"open('/proc/{me}/environ')",
        "the memory of the application": f"open('/proc/{me}/mem', 'rb')",
        "a signal to the application": f"import os; os.kill({me}, 0)",
        "a signal to the supervisor": "import os; os.kill(os.getppid(), 9)",
        "a signal to all": "import os; os.kill(-1, 0)",
        "a signal by a descriptor": "import fcntl, os; fcntl.fcntl(os.pipe()[0], 8, os.getppid())",
        "a pidfd": f"import os; os.pidfd_open({me})",
        "another program": "import os; os.execv('/bin/true', ['true'])",
        "a child process": "import os; os.fork()",
        "limits of the application": (
            f"import resource; resource.prlimit({me}, resource.RLIMIT_CPU, (1, 1))"
        ),
        "another program's memory": SYSCALL.format(f"{number['ptrace']}, 16, {me}, 0, 0"),
        "a mount namespace": SYSCALL.format(f"{number['unshare']}, 0x10020000"),
        "the keys of the user": SYSCALL.format(f"{number['keyctl']}, 0, -4, 0"),
        "shared memory of others": SYSCALL.format(f"{number['shmget']}, 1, 4096, 0o1600"),
        "memory that the supervisor cannot see": SYSCALL.format(f"{number['prctl']}, 4, 0, 0, 0, 0"),
        "the counters that the supervisor reads, shortened": (
            "import os; folder = '/proc/self/fd/'\n"
            "found = [f for f in os.listdir(folder) if os.path.lexists(folder + f)]\n"
            "for f in found:\n    if 'onnx-gauges' in os.readlink(folder + f): os.ftruncate(int(f), 0)"
        ),
        "io_uring": SYSCALL.format(f"{number['io_uring_setup']}, 8, 0"),
        "a call of tomorrow": SYSCALL.format("500, 0"),
    }  # fmt: skip


REFUSALS = {"EPERM", "EACCES"}


@needs_kernel
def test_hostile_code_in_a_worker(model: Path, host: ModelHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model.parent))
    with socket.create_server(("127.0.0.1", 0)) as listener, Hostile(model, host) as proxy:
        listener.setblocking(False)
        tried = attempts(model, listener.getsockname()[1])
        results = {what: proxy.attempt(code) for what, code in tried.items()}
        expected = {what: (REFUSALS, results[what]) for what in tried}
        for what in ("io_uring", "a call of tomorrow"):
            expected[what] = {"ENOSYS"}, results[what]
        # ptrace(PTRACE_ATTACH) and all others: the filter, before the kernel looks at the arguments.
        assert {what: got for what, (allowed, got) in expected.items() if got not in allowed} == {}
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert model.read_text() == "2"
    assert sorted(path.name for path in model.parent.iterdir()) == ["secret.txt", "two.txt"]


@needs_kernel
def test_the_same_code_without_a_sandbox_does_it(model: Path, host: ModelHost) -> None:
    """The attempts are real ones."""
    with Hostile(model, host, sandboxed=False) as proxy:
        for what in ("a new file", "a file beside the model", "a TCP socket", "a signal to the application",
                     "a mode", "the users", "its own model, written"):  # fmt: skip
            assert proxy.attempt(attempts(model, 9)[what]) == "done", what


@needs_kernel
def test_what_a_worker_needs_goes_on(model: Path, host: ModelHost) -> None:
    """Reading its model and the installation, threads, memory, and its own end."""
    with Hostile(model, host) as proxy:
        proxy.load()
        pid = worker_pid(host)
        for code in (f"assert open({str(model)!r}).read() == '2'", "import this, sqlite3, numpy.ma",
                     "import os; os.memfd_create('x')", "open('/proc/self/status').read()",
                     "import os; os.kill(os.getpid(), 0)", "open('/dev/null', 'w').write('x')"):  # fmt: skip
            assert proxy.attempt(code) == "done", code
        status = Path(f"/proc/{pid}/status").read_text()
        assert "NoNewPrivs:\t1" in status and "Seccomp:\t2" in status
        links = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1)}
        assert links == {"/dev/null", os.readlink(f"/proc/{pid}/fd/2")}
        host.snapshot()
        with pytest.raises(onnx_dl.WorkerDied):
            proxy.attempt("import os; os.abort()")
        assert is_gone(pid) and proxy.attempt("pass") == "done"


def in_threads(proxy: InferenceSessionProxy, x: np.ndarray) -> int:
    """Calls from four threads at once, each with a lane of its own; how many were right."""
    right: list[bool] = []
    threads = [
        threading.Thread(target=lambda: right.append(bool((proxy.run(None, {"x": x})[0] == x).all())))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(right)


@needs_kernel
@pytest.mark.parametrize("start", ["fork", "exec"])
def test_a_sandboxed_session_is_a_session(
    start: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Large and small values, OrtValues, threads, blocks, TTL, limits, groups, bytes and files."""
    import onnxruntime

    monkeypatch.setenv("ONNX_DL_START", start)
    path = tmp_path / "identity.onnx"
    path.write_bytes(identity_model())
    large, small = np.arange(2_000_000, dtype=np.float32), np.ones(3, np.float32)
    with ModelHost() as host, host.events() as events:
        plain = InferenceSessionProxy(path, providers=CPU, host=host, group="g")
        proxies = [
            InferenceSessionProxy(source, providers=CPU, host=host, sandbox=True, **how)
            for source, how in (
                (path, {"ttl": 0.05, "max_memory_hard": "2GB"}),
                (identity_model(), {"environment": {"A": "1"}}),
                (identity_model(), {"group": "g"}),
            )
        ]
        for proxy in (plain, *proxies):
            with proxy.session():
                for x in (large, small):
                    assert all((proxy.run(None, {"x": x})[0] == x).all() for _ in range(3))
                value = onnxruntime.OrtValue.ortvalue_from_numpy(small)
                assert (proxy.run_with_ort_values(None, {"x": value})[0].numpy() == small).all()
                assert in_threads(proxy, small) == 4
        assert wait_for(events, EventType.UNLOADED).reason == "ttl"
        units = {status.model for status in host.snapshot().models}
        assert {"group:g", "group:g#sandbox"} <= units
        proxies[1].unload()
        eventually(lambda: not proxies[1].is_loaded, "the unload")
        assert (proxies[1].run(None, {"x": small})[0] == small).all()
        for proxy in (plain, *proxies):
            proxy.close()


@needs_kernel
def test_memory_of_others_is_not_shared_with_it(host: ModelHost) -> None:
    """A worker could write to arrays of empty() and to results of other models, and read them later."""
    x = host.empty(1 << 16)
    x[:] = 2
    block = home_of(x)
    assert block is not None
    fd = block.mapping.duplicate()
    assert fd is not None
    inode = str(os.fstat(fd).st_ino)
    os.close(fd)
    for sandbox in (True, False):
        proxy = InferenceSessionProxy(identity_model(), providers=CPU, host=host, sandbox=sandbox)
        assert (proxy.run(None, {"x": x})[0] == x).all()
        assert (inode in Path(f"/proc/{worker_pid(host)}/maps").read_text().split()) is not sandbox
        proxy.unload()


def test_a_system_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names what is missing, and nothing is loaded without a sandbox."""
    terms = ModelSpec(key="k", name="n", cwd="/", path="m", sandbox=True).confinement()
    assert terms is not None
    monkeypatch.setattr(rights.resources, "has_one_thread", lambda: False)
    with pytest.raises(SandboxUnavailable, match="one thread"):
        rights.confine(terms, {})
    monkeypatch.setattr(rights.resources, "has_one_thread", lambda: True)
    monkeypatch.setattr(landlock, "version", lambda: 0)
    with pytest.raises(PlatformError, match="needs Landlock"):
        rights.confine(terms, {})
    monkeypatch.setattr(syscalls, "machine", lambda: None)
    with pytest.raises(SandboxUnavailable, match="x86-64 and aarch64"):
        seccomp.install(truncation=False)


@pytest.mark.parametrize("column", [0, 1])
def test_numbers_of_calls_are_different(column: int) -> None:
    tables = [table(column) for table in (syscalls.forbidden, syscalls.unknown, syscalls.checked)]
    numbers = [number for table in tables for number in table.values()]
    assert len(set(numbers)) == len(numbers) and max(numbers) <= syscalls.NEWEST
    steps = seccomp.program(list(syscalls.MACHINES.values())[column], 1, 0, truncation=True)
    for at, (operation, yes, no, _) in enumerate(steps):
        assert operation == 0x06 or at + 1 + max(yes, no) < len(steps)
    assert len(steps) < 4096


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_a_value_that_is_no_switch(value: object) -> None:
    with pytest.raises(ConfigError, match="neither True nor False"):
        parsing.parse_sandbox(value)
    with pytest.raises(ConfigError):
        InferenceSessionProxy(identity_model(), sandbox=value)  # type: ignore[arg-type]


@needs_kernel
def test_a_compiled_model(tmp_path: Path, host: ModelHost) -> None:
    with pytest.raises(onnx_dl.EngineError, match="cannot be loaded as a shared library"):
        path = tmp_path / "model.so"
        path.write_bytes(b"none")
        ExecutionSession(path, host=host, sandbox=True, eager=True)
