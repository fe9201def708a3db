"""InferenceSessionProxy: onnxruntime.InferenceSession's face on a model in a worker process.

Construction, and runs with arrays.  Runs with OrtValues are in :mod:`onnx_dl.session.ortvalue_runs`, metadata
and changes of providers in :mod:`onnx_dl.session.introspection`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np

from onnx_dl.client import callback_calls
from onnx_dl.client.cancellation import CancelWatch, not_begun
from onnx_dl.client.host_client import HostClient
from onnx_dl.client.host_registry import default_host
from onnx_dl.client.served_model import RunArguments
from onnx_dl.concurrency.deadline import Deadline, DeadlinePassed
from onnx_dl.concurrency.forking import importing
from onnx_dl.core import keywords, parsing
from onnx_dl.core.terms import Terms, WorkerOptions
from onnx_dl.core.types import Feed, OrtObject, Providers, Value
from onnx_dl.ort import options
from onnx_dl.session import isolation as isolated
from onnx_dl.session import model_source
from onnx_dl.session.inputs import USERS, check_owner, names_of, plain_name, refuse_dtypes, sharing
from onnx_dl.session.model_handle import ModelHandle
from onnx_dl.session.ortvalue_runs import OrtValueProxy

_MISSING: Final = object()


class InferenceSessionProxy(OrtValueProxy):
    """A drop-in for ``onnxruntime.InferenceSession`` whose model lives in a process of its own.

    Nothing is loaded until the first use.  All proxies of one model (the same file, options and providers)
    share one worker process; calls from many threads run at the same time.

    Args:
        model_path: path of an .onnx or .ort file (str or PathLike), or the serialized model as bytes; also
            accepted by onnxruntime's own name, ``path_or_bytes``.
        sess_options: an ``onnxruntime.SessionOptions``, read now: later changes have no effect, except to
            the memory of its initializers.
        providers: names, or (name, options) pairs, in order of preference.
        ttl: seconds without use after which the worker ends, as int, float or text such as ``"90s"`` or
            ``"5m"``; -1: never; 0: after each use.  The longest TTL of the proxies that used a model counts.
            For callers of onnxruntime's own signature a fourth positional argument that is a list is taken
            for ``provider_options``.
        provider_options: one dict per provider.
        host: the :class:`~onnx_dl.host.model_host.ModelHost` to use instead of the application's own.
        latency: how the two ends of a call wait for each other.  ``"auto"``: they poll for at most 0.3 ms
            before they sleep, but only while small calls follow each other at once on one connection, a core
            is free, and it makes them faster.  ``"low"``: they always do, which takes two cores; for small
            inputs and results.  ``"normal"``: they sleep.
        pin: the model is not evicted to make room for others while this proxy holds it.
        priority: idle models of lower priority are evicted first.
        max_memory: bytes, or text such as ``"300MB"``: a worker with more private memory after a call is
            replaced before the next call.  Callers see no error.  Its peak is this limit and one run's need.
        max_memory_hard: bytes or text: a worker with more than that during a run is ended, and its callers
            get :class:`~onnx_dl.errors.MemoryLimitExceeded`; None: no run is ended.  Checked every 10 ms
            while a call is under way, so shorter peaks may be missed.  Also the default of ``max_memory``.
        max_runs: calls after which a worker is replaced.
        group: a name.  All models of a host with the same group share one worker, and are loaded, limited and
            unloaded together.  This saves memory, above all a CUDA context per model.  A crash ends them all.
        environment: variables for this model's worker, such as ``{"OMP_NUM_THREADS": "4"}``; None as a value
            removes a variable.  They are set before its interpreter starts, so the load takes as long as
            without forking.  Proxies of one file with different environments have different workers.
        isolation: False: the model runs in this process (docs/in-process.md); True: in a worker process, or
            PlatformError at the first use; None: in a worker process, unless ``ONNX_DL_ISOLATION=off`` or the
            system has none (macOS, Windows).
        sha256: SHA-256 of the model's file or bytes, 64 hexadecimal digits; another file is refused.  A model
            with external data needs a dict that has a digest for each file, by its name relative to the
            model's folder.  Checked at each load (docs/security.md).
        sandbox: the model's worker has no network, no write access to files, and reads only its model and the
            installation (docs/security.md).  Linux with Landlock and seccomp.  The load cache is not used.
        eager: load the model now, so that errors are raised here, as onnxruntime does.
        **kwargs: ``enable_fallback``, ``read_config_from_model`` and ``disabled_optimizers`` are passed on;
            others are ignored, as onnxruntime does, with a warning if a name is close to one of these.

    Raises:
        ConfigError: (a ValueError) an argument is not valid; the message names it.
        TypeError: the model is neither a path nor bytes.
        ConfigError: an option cannot be sent to a worker, or a variable cannot be set; the message names it.
        ModelDigestMismatch: a file is not the one that ``sha256`` says; raised at the load.
        SandboxUnavailable: the system has no sandbox; raised at the load.
        NoSuchFile: (onnxruntime's) there is no such file.  Unless ``eager``, a file that is not a model is
            refused at first use.
    """

    def __init__(
        self,
        model_path: str | bytes | os.PathLike[str] = _MISSING,  # type: ignore[assignment]
        sess_options: OrtObject = None,
        providers: Providers = None,
        ttl: float | str | Providers = -1,
        provider_options: Providers = None,
        *,
        path_or_bytes: str | bytes | os.PathLike[str] = _MISSING,  # type: ignore[assignment]
        host: HostClient | None = None,
        latency: str = "auto",
        pin: bool = False,
        priority: int = 0,
        max_memory: int | str | None = None,
        max_memory_hard: int | str | None = None,
        max_runs: int | None = None,
        group: str | None = None,
        environment: Mapping[str, str | None] | None = None,
        isolation: bool | None = None,
        sha256: str | Mapping[str, str] | None = None,
        sandbox: bool = False,
        eager: bool = False,
        **kwargs: object,
    ) -> None:
        if ttl is None or isinstance(ttl, list | tuple):
            provider_options = provider_options if ttl is None else ttl
            ttl = -1
        model = model_path if model_path is not _MISSING else path_or_bytes
        if model is _MISSING:
            raise TypeError("InferenceSessionProxy() needs a model: a path or the model's bytes")
        location = model_source.locate(model)
        if unknown := kwargs.keys() - model_source.KNOWN:
            keywords.warn_of_slips(unknown, _keywords(), ("onnx_dl", "onnxruntime"))
        worker = WorkerOptions.parse(max_memory, max_memory_hard, max_runs, group, environment)
        worker = isolated.applied(worker.with_trust(sha256, sandbox), isolation)
        found = model_source.describe(location, sess_options, (providers, provider_options), kwargs, worker)
        self._set_up(ModelHandle(found, Terms.parse(ttl, latency, pin, priority), host or default_host()))
        self._sess_options_initial = sess_options
        if eager:
            self.load()

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: Feed,
        run_options: OrtObject = None,
        *,
        timeout: float | None = None,
    ) -> list[Value]:
        """One inference, as ``onnxruntime.InferenceSession.run``.

        Args:
            output_names: names of the outputs to compute; None or empty: all.
            input_feed: a value per input name: an array of any shape and fixed-size dtype, a text array, an
                OrtValue, a list or dict where the model takes sequences or maps, None for an absent optional.
            run_options: an ``onnxruntime.RunOptions``, read now; setting its ``terminate`` in another thread
                ends the run.
            timeout: seconds after which the run is told to end; the start of the host, a load and all other
                waits count.  None: no limit.

        Returns:
            One value per output, in order; arrays are writable, C-contiguous and the caller's own.

        Raises:
            RunTimeout: ``timeout`` passed.
            WorkerDied: the worker ended during the call.
            MemoryLimitExceeded: the worker had more memory than ``max_memory_hard``.
            Exception: onnxruntime's own, of the same class with the same message.
        """
        handle = self._handle
        if (
            type(input_feed) is dict
            and run_options is timeout is None
            and (model := handle.used) is not None
            and handle.live is None
        ):
            try:
                if (repeated := model.repeat(handle.lease, output_names, input_feed)) is not None:
                    return repeated
            except Exception as error:
                self._fall_back(error)
        return self._run(output_names, input_feed, run_options, timeout)

    def _run(
        self,
        output_names: Sequence[str] | None,
        input_feed: Feed,
        run_options: OrtObject,
        timeout: float | None,
    ) -> list[Value]:
        handle, feed = self._handle, self._as_feed(input_feed)
        names = names_of(output_names)
        deadline = plain = watch = None
        if run_options is not None or timeout is not None:
            deadline = Deadline.of(parsing.parse_timeout(timeout))
            plain, watch = options.read_run_options(run_options), CancelWatch(run_options, deadline)
        try:
            result: list[Value] = handle.model(deadline).run(handle.lease, names, feed, plain, watch)
        except DeadlinePassed as passed:
            raise not_begun(deadline, passed) from None
        except Exception as error:
            self._fall_back(error)
            return self.run(names, input_feed, run_options, timeout=timeout)
        return result if names is None or len(names) < 2 else sharing(names, result)

    async def arun(
        self,
        output_names: Sequence[str] | None,
        input_feed: Feed,
        run_options: OrtObject = None,
        *,
        timeout: float | None = None,
    ) -> list[Value]:
        """:meth:`run` for asyncio and trio, without a thread per call.  Cancelling it ends the run.

        Up to 32 calls of one model run at a time; others wait their turn.
        """
        asynchronous = importing("onnx_dl.client.awaited_calls")
        feed, names = self._as_feed(input_feed), names_of(output_names)
        plain = options.read_run_options(run_options)
        # The event loop must not wait for the start of a supervisor or for a load.
        result: list[Value] = await asynchronous.call(
            self._handle.in_use() or self._handle.model,
            self._handle.lease,
            RunArguments(names, feed, plain),
            parsing.parse_timeout(timeout),
            run_options,
        )
        return result if names is None else sharing(names, result)

    def run_async(
        self,
        output_names: Sequence[str] | None,
        input_feed: Feed,
        callback: Callable[..., object],
        user_data: object,
        run_options: OrtObject = None,
        *,
        timeout: float | None = None,
    ) -> None:
        """Starts one inference and returns at once.  Coroutines use :meth:`arun` instead.

        Args:
            output_names: as for :meth:`run`.
            input_feed: as for :meth:`run`.
            callback: is called as ``callback(results, user_data, error)``, in a thread that all callbacks
                share.  ``error`` is an empty text if the run succeeded.
            user_data: any object, for the callback.
            run_options: as for :meth:`run`.
            timeout: seconds after which the run is told to end, and the callback gets that error.

        Raises:
            RunTimeout: ``timeout`` passed before the run began.
            Exception: the call was refused before that.
        """
        if not (callback is None or callable(callback)):
            raise TypeError(f"run_async(): incompatible function arguments. {callback!r} is no function.")
        deadline = Deadline.of(parsing.parse_timeout(timeout))
        feed, names = self._as_feed(input_feed), names_of(output_names)
        plain = options.read_run_options(run_options)
        try:
            callback_calls.call_back(
                self._handle.model(deadline),
                self._handle.lease,
                RunArguments(names, feed, plain),
                callback_calls.Callback(callback, user_data, run_options, deadline, feed),
            )
        except DeadlinePassed as passed:
            raise not_begun(deadline, passed) from None

    def _as_feed(self, given: Feed) -> Feed:
        """The feed as a dict.  Refreshes initializers that the application changed."""
        handle = self._handle
        if handle.live is not None:
            handle.live.refresh()
        feed = {plain_name(name): given[name] for name in given.keys()}  # noqa: SIM118  # a list has none
        for value in feed.values():
            if type(value) is not np.ndarray:
                check_owner(value, self._sess)
            elif value.dtype.num >= USERS:
                refuse_dtypes(feed, lambda fed: handle.model().run(handle.lease, None, fed, None))
        return feed


def _keywords() -> frozenset[str]:
    """Names of all arguments of a session."""
    ours = inspect.signature(InferenceSessionProxy).parameters.keys() - {"kwargs"}
    return frozenset(ours | set(model_source.KNOWN))


InferenceSession = InferenceSessionProxy
