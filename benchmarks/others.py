"""What a user would pick instead, as ways to run one model in another process.

Each is a class with ``run(feed)`` and ``close()``.  All give the worker the same number of threads.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import multiprocessing.managers
import pickle
import secrets
from typing import Any

import numpy as np
import zmq

_SPAWN = multiprocessing.get_context("spawn")
_session: Any = None


def make_session(model: bytes, threads: int) -> Any:
    import os

    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _init(model: bytes, threads: int) -> None:
    global _session
    _session = make_session(model, threads)


def _run(feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    return _session.run(None, feed)


class ProcessPool:
    """concurrent.futures.ProcessPoolExecutor with one process."""

    def __init__(self, model: bytes, threads: int) -> None:
        self._pool = concurrent.futures.ProcessPoolExecutor(1, _SPAWN, _init, (model, threads))

    def run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        return self._pool.submit(_run, feed).result()

    def close(self) -> None:
        self._pool.shutdown()


class _Model:
    def __init__(self, model: bytes, threads: int) -> None:
        self._session = make_session(model, threads)

    def run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        return self._session.run(None, feed)


class _Manager(multiprocessing.managers.BaseManager):
    pass


_Manager.register("Model", _Model)


class Manager:
    """A multiprocessing manager that serves a session."""

    def __init__(self, model: bytes, threads: int) -> None:
        self._manager = _Manager(ctx=_SPAWN)
        self._manager.start()
        self._model = self._manager.Model(model, threads)

    def run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        return self._model.run(feed)

    def close(self) -> None:
        self._manager.shutdown()


def _serve_zmq(address: str, model: bytes, threads: int) -> None:
    session = make_session(model, threads)
    socket = zmq.Context().socket(zmq.REP)
    socket.bind(address)
    while feed := pickle.loads(socket.recv()):
        socket.send(pickle.dumps(session.run(None, feed), protocol=5))
    socket.send(b"")


class PickledZmq:
    """pyzmq, REQ and REP, with pickled arrays."""

    def __init__(self, model: bytes, threads: int) -> None:
        address = f"ipc://@bench-{secrets.token_hex(8)}"
        self._process = _SPAWN.Process(target=_serve_zmq, args=(address, model, threads))
        self._process.start()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.REQ)
        self._socket.linger = 0
        self._socket.connect(address)

    def run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        self._socket.send(pickle.dumps(feed, protocol=5))
        return pickle.loads(self._socket.recv())

    def close(self) -> None:
        self._socket.send(pickle.dumps(None))
        self._process.join(5)
        self._process.kill()
        self._process.join()
        self._context.destroy(linger=0)


class RayActor:
    """An actor of a Ray of its own."""

    def __init__(self, model: bytes, threads: int) -> None:
        import ray

        self._ray = ray
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        self._actor = ray.remote(_Model).remote(model, threads)

    def run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        return self._ray.get(self._actor.run.remote(feed))

    def close(self) -> None:
        self._ray.shutdown()


OTHERS: dict[str, type[Any]] = {
    "ProcessPoolExecutor": ProcessPool,
    "multiprocessing manager": Manager,
    "pyzmq, pickled": PickledZmq,
    "Ray actor": RayActor,
}
