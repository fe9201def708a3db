"""What a user would pick instead, as ways to run one model in another process.

Each is a class with ``start``, ``call`` and ``stop``; ``stop`` may follow a ``start`` that failed.  ``needs``
names a package that must be installed.  All give their session the same number of threads.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import multiprocessing
import multiprocessing.managers
import multiprocessing.process
import os
import pickle
import secrets
import shutil
import tempfile
from typing import Any, Final

import numpy as np
import zmq

_SPAWN: Final = multiprocessing.get_context("spawn")
_session: Any = None

Feed = dict[str, np.ndarray]


def make_session(model: bytes | str, threads: int) -> Any:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _init(model: bytes, threads: int) -> None:
    global _session
    _session = make_session(model, threads)


def _run(feed: Feed) -> list[np.ndarray]:
    return _session.run(None, feed)


class Other:
    """What they have in common."""

    name: str
    needs: str | None = None

    def __init__(self, model: bytes, threads: int) -> None:
        self.model = model
        self.threads = threads

    @classmethod
    def is_installed(cls) -> bool:
        return cls.needs is None or importlib.util.find_spec(cls.needs) is not None

    def start(self) -> None:
        raise NotImplementedError

    def call(self, feed: Feed) -> list[np.ndarray]:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError


class ProcessPool(Other):
    """One process."""

    name = "ProcessPoolExecutor"

    def start(self) -> None:
        self._pool = concurrent.futures.ProcessPoolExecutor(1, _SPAWN, _init, (self.model, self.threads))

    def call(self, feed: Feed) -> list[np.ndarray]:
        return self._pool.submit(_run, feed).result()

    def stop(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class _Model:
    def __init__(self, model: bytes, threads: int) -> None:
        self._session = make_session(model, threads)

    def run(self, feed: Feed) -> list[np.ndarray]:
        return self._session.run(None, feed)


class _Manager(multiprocessing.managers.BaseManager):
    pass


_Manager.register("Model", _Model)


class Manager(Other):
    """A manager that serves a session, to each thread of the caller over a connection of its own."""

    name = "multiprocessing manager"

    def start(self) -> None:
        self._manager = _Manager(ctx=_SPAWN)
        self._manager.start()
        self._served = self._manager.Model(self.model, self.threads)

    def call(self, feed: Feed) -> list[np.ndarray]:
        return self._served.run(feed)

    def stop(self) -> None:
        if hasattr(self._manager, "shutdown"):  # it has none before it started
            self._manager.shutdown()


def _serve_zmq(address: str, model: bytes, threads: int) -> None:
    session = make_session(model, threads)
    socket = zmq.Context().socket(zmq.REP)
    socket.bind(address)
    while True:
        socket.send(pickle.dumps(session.run(None, pickle.loads(socket.recv())), protocol=5))


class PickledZmq(Other):
    """REQ and REP."""

    name = "pyzmq, pickled arrays"
    _process: multiprocessing.process.BaseProcess | None = None

    def start(self) -> None:
        address = f"ipc://@bench-{secrets.token_hex(8)}"
        self._context = zmq.Context()
        process = _SPAWN.Process(target=_serve_zmq, args=(address, self.model, self.threads), daemon=True)
        process.start()
        self._process = process
        self._socket = self._context.socket(zmq.REQ)
        self._socket.linger = 0
        self._socket.rcvtimeo = 120_000
        self._socket.connect(address)

    def call(self, feed: Feed) -> list[np.ndarray]:
        self._socket.send(pickle.dumps(feed, protocol=5))
        return pickle.loads(self._socket.recv())

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._context.destroy(linger=0)


class RayActor(Other):
    """An actor of a Ray of its own, which leaves no files behind."""

    name = "Ray actor"
    needs = "ray"

    def start(self) -> None:
        import ray

        self._ray = ray
        self._folder = tempfile.mkdtemp(prefix="ray-")
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=self._folder,
        )
        self._actor = ray.remote(_Model).remote(self.model, self.threads)

    def call(self, feed: Feed) -> list[np.ndarray]:
        return self._ray.get(self._actor.run.remote(feed))

    def stop(self) -> None:
        self._ray.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)


OTHERS: Final[tuple[type[Other], ...]] = (ProcessPool, Manager, PickledZmq, RayActor)
