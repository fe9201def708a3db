"""The servers that are compared, each a program of its own with free ports.

- tritonserver: the program in ``nvidia-pytriton``'s wheel, started by hand.  It finds the Python backend only
  in a folder that also has the stub for the interpreter's version, so such a folder is put together; the stub
  needs the wheel's libraries in ``LD_LIBRARY_PATH``, and takes its modules from the first ``python3`` in
  ``PATH``.
- MLServer: ``mlserver start`` with a runtime of our own.  Its pool of workers (``parallel_workers``) does not
  start with a current uvloop and would copy each request once more: the models are in the server's process.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Final

import psutil

from benchmarks.serving import works
from benchmarks.serving.works import Work

_MARK: Final = "ONNX_DL_BENCHMARKED_SERVER"
_START: Final = 120.0
"""Seconds that a server has to become ready."""


class NotInstalled(Exception):
    """Says why a peer is not measured."""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _get(url: str) -> int:
    """The status of GET; 0: nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


class Server:
    """One server.  ``http`` and ``grpc`` are ``host:port``.  All processes that it starts are its own: they
    have a mark in their environment."""

    name: ClassVar[str]
    ways: ClassVar[tuple[str, ...]]

    def __init__(self, folder: Path, served: Sequence[Work], *, loaded: Sequence[str]) -> None:
        self._folder = folder
        self._mark = secrets.token_hex(8)
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self.http = self.grpc = ""
        self._loaded = list(loaded)
        self.repository = folder / "repository"
        self.repository.mkdir(parents=True)
        self._write_repository(served)

    def _write_repository(self, served: Sequence[Work]) -> None:
        raise NotImplementedError

    def _command(self) -> list[str]:
        """Sets ``http`` and ``grpc``, if they are known before it runs."""
        raise NotImplementedError

    def _environment(self) -> dict[str, str]:
        return {}

    def _is_ready(self) -> bool:
        """The server, and each model that it loads."""
        paths = ["health/live", *(f"models/{name}/ready" for name in self._loaded)]
        return all(_get(f"http://{self.http}/v2/{path}") == 200 for path in paths)

    def start(self) -> None:
        """Returns when all models that it loads are ready."""
        command = self._command()
        with self._log.open("wb") as out:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, _MARK: self._mark, **self._environment()},
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        until = time.monotonic() + _START
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{self.name} does not start: {self._said()[-3000:]}")
            time.sleep(0.05)

    def _said(self) -> str:
        return self._log.read_text(errors="replace")

    def control(self, name: str, what: str) -> None:
        """``load`` or ``unload``."""
        url = f"http://{self.http}/v2/repository/models/{name}/{what}"
        request = urllib.request.Request(url, b"{}", {"Content-Type": "application/json"}, method="POST")
        with urllib.request.urlopen(request, timeout=120) as answer:
            answer.read()

    def processes(self) -> list[psutil.Process]:
        """All that run now."""
        wanted = f"{_MARK}={self._mark}".encode()
        found = []
        for pid in psutil.pids():
            with contextlib.suppress(OSError, psutil.Error):
                if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    found.append(psutil.Process(pid))
        return found

    def memory(self) -> tuple[int, int]:
        """Bytes of the first process alone (private), and of all (PSS)."""
        assert self._process is not None
        own = total = 0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                info = process.memory_full_info()
                total += info.pss
                own += info.uss if process.pid == self._process.pid else 0
        return own, total

    def stop(self) -> None:
        """Ends all of its processes and removes its folder."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(40)
            for process in self.processes():
                with contextlib.suppress(psutil.Error):
                    process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


class OnnxDl(Server):
    """``onnx-dl serve``, from this source tree."""

    name = "onnx-dl"
    ways = ("HTTP", "HTTP + shm", "gRPC", "gRPC + shm", "JSON")
    _shm: ClassVar[str] = "copy"

    def _write_repository(self, served: Sequence[Work]) -> None:
        works.for_onnx_dl(self.repository, served)

    def _command(self) -> list[str]:
        command = [sys.executable, "-m", "onnx_dl", "serve", "--repository", str(self.repository)]
        command += ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--client-shm", self._shm]
        command += ["--model-control", "explicit"]
        for name in self._loaded:
            command += ["--load-model", name]
        return command

    def _environment(self) -> dict[str, str]:
        (self._folder / "run").mkdir(mode=0o700, exist_ok=True)
        return {"ONNX_DL_RUNTIME_DIR": str(self._folder / "run"), "ONNX_DL_CACHE": "off"}

    def _is_ready(self) -> bool:
        told = dict(re.findall(r"^(HTTP|gRPC): (?:http://)?(\S+)$", self._said(), re.MULTILINE))
        self.http, self.grpc = told.get("HTTP", ""), told.get("gRPC", "")
        return re.search(r"^ready$", self._said(), re.MULTILINE) is not None and super()._is_ready()


class Mapping(OnnxDl):
    """The same, but its workers map the clients' shared memory."""

    name = "onnx-dl, mapped"
    ways = ("HTTP + shm", "gRPC + shm")
    _shm = "map"


class Peer(Server):
    """A server that another interpreter runs; ``python`` is its path."""

    def __init__(self, folder: Path, served: Sequence[Work], *, loaded: Sequence[str], python: str) -> None:
        self._python = Path(python)
        self._packages = self._find_packages()
        super().__init__(folder, served, loaded=loaded)

    def _find_packages(self) -> Path:
        code = f"import {self.module} as m, os; print(os.path.dirname(os.path.dirname(m.__file__)))"
        done = subprocess.run([str(self._python), "-c", code], capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotInstalled(f"{self._python} cannot import {self.module}")
        return Path(done.stdout.strip())

    module: ClassVar[str]


class Triton(Peer):
    """tritonserver with the Python backend."""

    name = "Triton"
    module = "pytriton"
    ways = ("HTTP", "HTTP + shm", "gRPC", "gRPC + shm", "JSON")

    def _write_repository(self, served: Sequence[Work]) -> None:
        works.for_triton(self.repository, served)

    def _write_backend(self) -> None:
        program = self._packages / "pytriton" / "tritonserver"
        backend = self._folder / "backends" / "python"
        shutil.copytree(program / "backends" / "python", backend)
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        version = subprocess.check_output([str(self._python), "-c", code], text=True).strip()
        shutil.copy(program / "python_backend_stubs" / version / "triton_python_backend_stub", backend)

    def _command(self) -> list[str]:
        self._write_backend()
        ports = [_free_port() for _ in range(3)]
        self.http, self.grpc = (f"127.0.0.1:{port}" for port in ports[:2])
        command = [str(self._packages / "pytriton" / "tritonserver" / "bin" / "tritonserver")]
        command += ["--model-repository", str(self.repository), "--model-control-mode", "explicit"]
        command += ["--backend-directory", str(self._folder / "backends")]
        command += [f"--load-model={name}" for name in self._loaded]
        for which, port in zip(("http", "grpc", "metrics"), ports, strict=True):
            command += [f"--{which}-address", "127.0.0.1"]
            command += [f"--{which}-port", str(port)]
        return command

    def _environment(self) -> dict[str, str]:
        libraries = str(self._packages / "nvidia_pytriton.libs")
        return {
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [libraries, os.environ.get("LD_LIBRARY_PATH")])),
            "PATH": os.pathsep.join([str(self._python.parent), os.environ["PATH"]]),
            "PYTHONPATH": "",
        }


class MlServer(Peer):
    """MLServer; it has neither binary tensors over HTTP nor shared memory."""

    name = "MLServer"
    module = "mlserver"
    ways = ("gRPC", "JSON")

    def _write_repository(self, served: Sequence[Work]) -> None:
        works.for_mlserver(self.repository, served)
        shutil.copy(works.HERE / "mlserver_runtime.py", self.repository)
        ports = [_free_port() for _ in range(3)]
        self._settings = {
            "host": "127.0.0.1",
            **dict(zip(("http_port", "grpc_port", "metrics_port"), ports, strict=True)),
            "parallel_workers": 0,
            "metrics_endpoint": None,
            "grpc_max_message_length": -1,
            "load_models_at_startup": True,
        }
        (self.repository / "settings.json").write_text(json.dumps(self._settings))
        self._ports = ports

    def _command(self) -> list[str]:
        self.http, self.grpc = (f"127.0.0.1:{port}" for port in self._ports[:2])
        return [str(self._python), "-m", "mlserver.cli.main", "start", str(self.repository)]

    def _environment(self) -> dict[str, str]:
        return {"PYTHONPATH": str(self.repository)}


SERVERS: Final[tuple[type[Server], ...]] = (OnnxDl, Mapping, Triton, MlServer)
