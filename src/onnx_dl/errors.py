"""Every error that onnx-dl raises on its own account.

Covers the classes and what they carry. How an error crosses a process boundary is
:mod:`onnx_dl.protocol.failures`; errors of onnxruntime itself are never wrapped: they arrive as
onnxruntime's own classes with onnxruntime's own messages.

::

    OnnxDLError
    ├── ConfigError (ValueError)            a setting or argument that cannot be
    ├── InstallationError (ImportError)     onnxruntime is missing, or two builds overwrote each other
    ├── PlatformError (OSError)             this operating system lacks what we stand on
    ├── ProxyClosedError (RuntimeError)     a proxy was used after close()
    ├── SharedMemoryError (MemoryError)     the system refused the memory for a tensor
    ├── DescriptorsExhausted (OSError)      a process may have no more file descriptors
    ├── ProcessesExhausted (OSError)        the system has no process or thread left for this user
    ├── UnsupportedValueError (TypeError)   a value that cannot travel to a worker
    ├── ReentrantUse (RuntimeError)         a thread interrupted itself and would wait for itself
    ├── EngineError (RuntimeError)          an engine without exceptions of its own (onnx-mlir) failed
    ├── ProtocolError                       a peer said what the protocol does not allow
    ├── InvalidTransition                   a model was asked for a step its state does not allow
    ├── UnloadTimeout (TimeoutError)        unload() gave up waiting for running calls
    ├── RunTimeout (TimeoutError)           run(timeout=) passed
    ├── RemoteError                         a worker raised a class this process does not know
    ├── SupervisorError
    │   ├── SupervisorStartError            the supervisor process did not come up
    │   │   └── SupervisorUnreachable       nobody answers at its address
    │   ├── SupervisorDied                  it went away under us
    │   ├── SupervisorTimeout (TimeoutError)   it lives but does not answer
    │   └── HostClosing                     it is about to go
    ├── CapacityError (MemoryError)         the memory limit has no room for the model
    └── WorkerError                         has ``retry_after``
        ├── WorkerDied                      the worker process ended during a call or a load
        │   └── MemoryLimitExceeded (MemoryError)   it ended itself: a run took more than max_memory_hard
        └── LoadTimeout (TimeoutError)      the model did not load in time
"""

from __future__ import annotations

import errno
from typing import Any, ClassVar


class OnnxDLError(Exception):
    """Base of all errors of onnx-dl.  ``code`` names the class on the wire and never changes."""

    code: ClassVar[str] = "error"

    def details(self) -> dict[str, Any]:
        """The attributes that must survive a trip between processes; plain data."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


class ConfigError(OnnxDLError, ValueError):
    """An argument or environment variable has a value that cannot be used."""

    code = "config"


class InstallationError(OnnxDLError, ImportError):
    """onnxruntime is missing or damaged; the message says which command mends it."""

    code = "installation"


class PlatformError(OnnxDLError, OSError):
    """The operating system lacks something that onnx-dl stands on."""

    code = "platform"


class ProxyClosedError(OnnxDLError, RuntimeError):
    """The proxy was closed; make a new one."""

    code = "closed"


class SharedMemoryError(OnnxDLError, MemoryError):
    """The system refused shared memory for a tensor."""

    code = "shared-memory"


class DescriptorsExhausted(OnnxDLError, OSError):
    """A process of ours, or the application, may have no more file descriptors.

    What is loaded goes on.  ``errno`` is EMFILE.  :func:`onnx_dl.system.descriptor_limits.exhausted` makes one.
    """

    code = "descriptors-exhausted"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = errno.EMFILE


class ProcessesExhausted(OnnxDLError, OSError):
    """A process or a thread that is needed cannot be started, because there may be no more.

    What is loaded goes on.  ``errno`` is EAGAIN.  :func:`onnx_dl.concurrency.spawning.exhausted` makes one.
    """

    code = "processes-exhausted"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = errno.EAGAIN


class UnsupportedValueError(OnnxDLError, TypeError):
    """A value of this kind cannot travel to a worker."""

    code = "unsupported-value"


class ReentrantUse(OnnxDLError, RuntimeError):
    """A signal handler, a ``__del__`` or a callback used a model where its thread would wait for itself.

    It comes at once, and nothing was done.  Use the model later or in another thread: a handler may set a
    flag, or put work into a ``queue.SimpleQueue``.
    """

    code = "reentrant"


class EngineError(OnnxDLError, RuntimeError):
    """An engine that has no exceptions of its own could not load or run a model; onnx-mlir is one."""

    code = "engine"


class FilesChanging(OnnxDLError, RuntimeError):
    """The files of a model changed each time that it was loaded, or its worker sees others than this
    process under the same paths."""

    code = "files-changing"


class ProtocolError(OnnxDLError):
    """A peer sent something that the protocol does not allow, or speaks another version of it."""

    code = "protocol"


class InvalidTransition(OnnxDLError):
    """A model's state does not allow the event; the message carries the model's recent history."""

    code = "transition"


class UnloadTimeout(OnnxDLError, TimeoutError):
    """``unload(timeout=...)`` gave up; the unload goes on and happens when the running calls end."""

    code = "unload-timeout"


class RunTimeout(OnnxDLError, TimeoutError):
    """``run(timeout=...)`` passed; the run was told to end, as by ``RunOptions.terminate``.  A load that it
    waited for goes on for the next caller."""

    code = "run-timeout"


class RemoteError(OnnxDLError):
    """A worker raised an exception of a class that this process has no counterpart for.

    ``type_name`` is the class's qualified name, ``traceback`` the worker's own traceback as text.
    """

    code = "remote"

    def __init__(self, message: str, type_name: str = "", traceback: str = "") -> None:
        super().__init__(message)
        self.type_name = type_name
        self.traceback = traceback


class SupervisorError(OnnxDLError):
    """The supervisor process could not serve us."""

    code = "supervisor"


class SupervisorStartError(SupervisorError):
    """The supervisor process did not come up; the message says what it printed or how it ended."""

    code = "supervisor-start"


class SupervisorUnreachable(SupervisorStartError):
    """Nobody listens at the supervisor's address, or it went away before it answered."""

    code = "supervisor-unreachable"


class SupervisorDied(SupervisorError):
    """The supervisor process went away, and all workers with it; the next use starts a new one."""

    code = "supervisor-died"


class SupervisorTimeout(SupervisorError, TimeoutError):
    """The supervisor process lives but did not answer in time (``ONNX_DL_START_TIMEOUT``): it is stopped, or
    the machine is too busy."""

    code = "supervisor-timeout"


class HostClosing(SupervisorError):
    """The host is shutting down and takes no new work; the next one can load the model."""

    code = "host-closing"


class CapacityError(OnnxDLError, MemoryError):
    """The host's memory limit, or its limit of GPU memory, has no room for the model.

    Attributes:
        needed: bytes that the model needs, as far as is known.
        limit: bytes that all workers together may take.
        in_use: bytes that they took when this was decided.
        resource: ``memory`` or ``gpu memory``: what these bytes are of.
        size: bytes that the model takes once it is loaded, where that was measured, else 0.  If only
            ``needed`` is more than the limit, it is the load that does not fit.
    """

    code = "capacity"

    def __init__(
        self,
        message: str,
        needed: int = 0,
        limit: int = 0,
        in_use: int = 0,
        resource: str = "memory",
        size: int = 0,
    ) -> None:
        super().__init__(message)
        self.resource = resource
        self.size = size
        self.needed = needed
        self.limit = limit
        self.in_use = in_use


class WorkerError(OnnxDLError):
    """A worker failed as a process.

    ``retry_after`` is the number of seconds until the host will try this model again; 0 means at once.
    """

    code = "worker"

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class WorkerDied(WorkerError):
    """The worker process ended during a call or while it loaded its model.

    Attributes:
        pid: process id that the worker had.
        exit_code: what it exited with, or None when a signal ended it.
        signal: the signal's number, or None.
        stderr: the last lines that the worker wrote to its standard error.
        reason: ``crash``, ``request`` (``unload(force=True)``) or ``exit`` (the host went down).
        retry_after: seconds until the host will load the model again; 0 means at once.
    """

    code = "worker-died"

    def __init__(
        self,
        message: str,
        pid: int = 0,
        exit_code: int | None = None,
        signal: int | None = None,
        stderr: str = "",
        reason: str = "crash",
        retry_after: float = 0.0,
    ) -> None:
        super().__init__(message, retry_after)
        self.pid = pid
        self.exit_code = exit_code
        self.signal = signal
        self.stderr = stderr
        self.reason = reason


class MemoryLimitExceeded(WorkerDied, MemoryError):
    """The worker ended itself during a run, because it had more memory of its own than ``max_memory_hard``.

    Attributes, beside those of :class:`WorkerDied`:
        limit: bytes that it was allowed.
        used: bytes that it had when it saw that.
    """

    code = "memory-limit-exceeded"

    def __init__(self, message: str, limit: int = 0, used: int = 0, **more: Any) -> None:
        super().__init__(message, **more)
        self.limit = limit
        self.used = used


class LoadTimeout(WorkerError, TimeoutError):
    """The model did not load within ``ONNX_DL_LOAD_TIMEOUT`` seconds, and its worker was ended; or it was not
    ready within the caller's own ``timeout``, and the load goes on for the next caller."""

    code = "load-timeout"


def _tree(cls: type[OnnxDLError]) -> list[type[OnnxDLError]]:
    return [cls] + [found for sub in cls.__subclasses__() for found in _tree(sub)]


BY_CODE: dict[str, type[OnnxDLError]] = {cls.code: cls for cls in _tree(OnnxDLError)}
