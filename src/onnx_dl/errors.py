"""All errors that onnx-dl itself raises, with their attributes.

Errors of onnxruntime are never wrapped: they arrive as onnxruntime's own classes with onnxruntime's messages.

::

    OnnxDLError
    ├── ConfigError (ValueError)            a setting or argument is invalid
    ├── InstallationError (ImportError)     onnxruntime is missing or damaged
    ├── PlatformError (OSError)             this operating system lacks a required feature
    │   └── SandboxUnavailable              the system lacks a feature that sandbox=True requires
    ├── ProxyClosedError (RuntimeError)     a proxy was used after close()
    ├── SharedMemoryError (MemoryError)     the system refused the memory for a tensor
    ├── DescriptorsExhausted (OSError)      a process may have no more file descriptors
    ├── ProcessesExhausted (OSError)        this user may have no more processes or threads
    ├── UnsupportedValueError (TypeError)   a value cannot be sent to a worker
    ├── ForeignMemoryError (ValueError)     another process's shared memory lacks bytes that a call needs
    │   └── PlaceTooSmall                   a result does not fit its place there
    ├── ReentrantUse (RuntimeError)         a thread would wait for itself
    ├── EngineError (RuntimeError)          an engine without own exceptions (onnx-mlir) failed
    ├── FilesChanging (RuntimeError)        the files of a model changed during each load
    ├── ModelDigestMismatch (ValueError)    a file of a model is not the one that sha256= names
    ├── ProtocolError                       a peer violated the protocol
    ├── InvalidTransition                   a model's state does not allow the event
    ├── UnloadTimeout (TimeoutError)        unload() stopped waiting for running calls
    ├── RunTimeout (TimeoutError)           the time of run(timeout=) is over
    ├── RemoteError                         a worker raised an unknown class
    ├── SupervisorError
    │   ├── SupervisorStartError            the supervisor process did not start
    │   │   └── SupervisorUnreachable       there is no answer at its address
    │   ├── SupervisorDied                  the supervisor process ended
    │   ├── SupervisorTimeout (TimeoutError)   the supervisor is alive but does not answer
    │   └── HostClosing                     the host is shutting down
    ├── CapacityError (MemoryError)         the memory limit has no room for the model
    └── WorkerError                         has ``retry_after``
        ├── WorkerDied                      the worker process ended during a call or a load
        │   └── MemoryLimitExceeded (MemoryError)   it exceeded max_memory_hard during a run
        └── LoadTimeout (TimeoutError)      the model did not load in time
"""

from __future__ import annotations

from errno import EAGAIN, EMFILE
from typing import Any, ClassVar


class OnnxDLError(Exception):
    """Base of all errors of onnx-dl.  ``code`` names the class in messages and never changes."""

    code: ClassVar[str] = "error"

    def details(self) -> dict[str, object]:
        """Return the attributes that other processes need, as plain data."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


class ConfigError(OnnxDLError, ValueError):
    """An argument or environment variable has an invalid value."""

    code = "config"


class InstallationError(OnnxDLError, ImportError):
    """onnxruntime is missing or damaged; the message names the command that repairs it."""

    code = "installation"


class PlatformError(OnnxDLError, OSError):
    """The operating system lacks a feature that the request needs.  Worker processes and shared hosts need
    Linux 5.3 or newer; memory limits need ``/proc``."""

    code = "platform"


class SandboxUnavailable(PlatformError):
    """The kernel or the container lacks a feature that ``sandbox=True`` requires; the message names it.
    The model was not loaded."""

    code = "sandbox-unavailable"


class ProxyClosedError(OnnxDLError, RuntimeError):
    """The proxy is closed; create a new one."""

    code = "closed"


class SharedMemoryError(OnnxDLError, MemoryError):
    """The system refused shared memory for a tensor."""

    code = "shared-memory"


class DescriptorsExhausted(OnnxDLError, OSError):
    """The application, or a process of onnx-dl, may have no more file descriptors.  Loaded models keep
    working.  ``errno`` is EMFILE."""

    code = "descriptors-exhausted"
    errno = EMFILE


class ProcessesExhausted(OnnxDLError, OSError):
    """A process or thread cannot be started, because the system allows no more.  Loaded models keep working.
    ``errno`` is EAGAIN."""

    code = "processes-exhausted"
    errno = EAGAIN


class UnsupportedValueError(OnnxDLError, TypeError):
    """A value of this kind cannot be sent to a worker."""

    code = "unsupported-value"


class ForeignMemoryError(OnnxDLError, ValueError):
    """Shared memory that another process has made does not have the bytes that a call needs, or cannot be
    read or written.  Its maker may truncate it at any time."""

    code = "foreign-memory"


class PlaceTooSmall(ForeignMemoryError):
    """A result has more bytes than its place.  Nothing was written.

    Attributes:
        output: name of the output; empty if that is not known.
        needed: bytes of the result.
        available: bytes of the place.
    """

    code = "place-too-small"

    def __init__(self, message: str, *, output: str = "", needed: int = 0, available: int = 0) -> None:
        super().__init__(message)
        self.output = output
        self.needed = needed
        self.available = available


class ReentrantUse(OnnxDLError, RuntimeError):
    """A signal handler, a ``__del__`` or a callback used a model where its thread would wait for itself.
    Raised at once; nothing was done.  Use the model later or in another thread: a handler may set a flag, or
    put work into a ``queue.SimpleQueue``."""

    code = "reentrant"


class EngineError(OnnxDLError, RuntimeError):
    """An engine without exceptions of its own, such as onnx-mlir, could not load or run a model."""

    code = "engine"


class FilesChanging(OnnxDLError, RuntimeError):
    """The files of a model changed during each load, or its worker sees other files at the same paths than
    this process."""

    code = "files-changing"


class ModelDigestMismatch(OnnxDLError, ValueError):
    """A file of a model has another SHA-256 than ``sha256=`` says, or the argument has none for it.
    The model was not loaded.

    Attributes:
        path: the file; a name, if the model was given as bytes.
        expected: 64 hexadecimal digits; empty: none was given for this file.
        actual: those of the file; empty: it was not read, or does not exist.
    """

    code = "model-digest-mismatch"

    def __init__(self, message: str, path: str = "", expected: str = "", actual: str = "") -> None:
        super().__init__(message)
        self.path = path
        self.expected = expected
        self.actual = actual


class ProtocolError(OnnxDLError):
    """A peer violated the protocol, or uses another version of it."""

    code = "protocol"


class InvalidTransition(OnnxDLError):
    """A model's state does not allow the event; the message contains the model's recent history."""

    code = "transition"


class UnloadTimeout(OnnxDLError, TimeoutError):
    """``unload(timeout=...)`` stopped waiting; the model is unloaded when its running calls end."""

    code = "unload-timeout"


class RunTimeout(OnnxDLError, TimeoutError):
    """The time of ``run(timeout=...)`` is over.  The run was cancelled, as by ``RunOptions.terminate``; a
    load that it waited for continues for the next caller."""

    code = "run-timeout"


class RemoteError(OnnxDLError):
    """A worker raised an exception of a class that this process does not have.

    Attributes:
        type_name: qualified name of the class.
        traceback: the worker's traceback as text.
    """

    code = "remote"

    def __init__(self, message: str, type_name: str = "", traceback: str = "") -> None:
        super().__init__(message)
        self.type_name = type_name
        self.traceback = traceback


class SupervisorError(OnnxDLError):
    """The supervisor process could not handle a request."""

    code = "supervisor"


class SupervisorStartError(SupervisorError):
    """The supervisor process did not start; the message has its output, or how it ended."""

    code = "supervisor-start"


class SupervisorUnreachable(SupervisorStartError):
    """The supervisor's address has no listener, or the supervisor ended before it answered."""

    code = "supervisor-unreachable"


class SupervisorDied(SupervisorError):
    """The supervisor process ended, and all workers with it; the next use starts a new one."""

    code = "supervisor-died"


class SupervisorTimeout(SupervisorError, TimeoutError):
    """The supervisor process is alive but did not answer in time (``ONNX_DL_START_TIMEOUT``): it is stopped,
    or the machine is too busy."""

    code = "supervisor-timeout"


class HostClosing(SupervisorError):
    """The host is shutting down and accepts no new work; the next one can load the model."""

    code = "host-closing"


class CapacityError(OnnxDLError, MemoryError):
    """The host's memory limit, or its limit of GPU memory, has no room for the model.

    Attributes:
        needed: bytes that the model needs, as far as known.
        limit: bytes that all workers together may use.
        in_use: bytes that they used at this moment.
        resource: ``memory`` or ``gpu memory``.
        size: measured bytes of the loaded model; 0 if unknown.  If only ``needed`` exceeds the limit, the
            load does not fit, but the loaded model would.
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
    """A worker process failed.

    Attributes:
        retry_after: seconds until the host loads this model again; 0 means at once.
    """

    code = "worker"

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class WorkerDied(WorkerError):
    """The worker process ended during a call or while it loaded its model.

    Attributes:
        pid: process id of the worker.
        exit_code: its exit code, or None if a signal ended it.
        signal: the signal's number, or None.
        stderr: the last lines that the worker wrote to its standard error.
        reason: ``crash``, ``request`` (``unload(force=True)``) or ``exit`` (the host went down).
        retry_after: seconds until the host loads the model again; 0 means at once.
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
    """The worker ended itself during a run, because its own memory exceeded ``max_memory_hard``.

    It has the attributes of :class:`WorkerDied`, and two more.

    Attributes:
        limit: bytes that the worker was allowed.
        used: bytes that it had when it noticed.
    """

    code = "memory-limit-exceeded"

    def __init__(self, message: str, limit: int = 0, used: int = 0, **more: Any) -> None:
        super().__init__(message, **more)
        self.limit = limit
        self.used = used


class LoadTimeout(WorkerError, TimeoutError):
    """The model was not loaded within ``ONNX_DL_LOAD_TIMEOUT`` seconds, and its worker was ended; or not
    within the caller's own ``timeout``, and the load continues for the next caller."""

    code = "load-timeout"


def _tree(cls: type[OnnxDLError]) -> list[type[OnnxDLError]]:
    return [cls] + [found for sub in cls.__subclasses__() for found in _tree(sub)]


BY_CODE: dict[str, type[OnnxDLError]] = {cls.code: cls for cls in _tree(OnnxDLError)}
