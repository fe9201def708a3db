"""InferenceSessionProxy: onnxruntime.InferenceSession's face on a model in a worker process.

Covers construction, runs and changes of providers; what a session says of itself is
:mod:`onnx_dl.session.introspection`'s, what is ours :mod:`onnx_dl.session.proxy`'s, bindings are :mod:`onnx_dl.session.io_binding`'s,
constructor arguments :mod:`onnx_dl.session.model_source`'s.
"""

from __future__ import annotations

import difflib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Self

import numpy as np

from onnx_dl.client import callback_calls
from onnx_dl.client.cancellation import CancelWatch, not_begun
from onnx_dl.client.lease import Lease
from onnx_dl.client.pending_call import RetainedOutputs
from onnx_dl.concurrency.deadline import Deadline, DeadlinePassed
from onnx_dl.concurrency.forking import importing
from onnx_dl.core import parsing
from onnx_dl.core.environment import parse as parse_environment
from onnx_dl.core.spec import ModelSpec
from onnx_dl.errors import ConfigError, OnnxDLError
from onnx_dl.host.model_host import ModelHost
from onnx_dl.ort import options, ortvalues
from onnx_dl.session import model_source
from onnx_dl.session.inputs import USERS, are_names, check_names, names_of, plain_name, refuse_dtypes, sharing
from onnx_dl.session.introspection import DescribedProxy
from onnx_dl.session.io_binding import IOBinding, place_of, take_results, vector_class
from onnx_dl.session.proxy import ModelProxy, bytes_of
from onnx_dl.system import installation

_MISSING: Final = object()


class InferenceSessionProxy(DescribedProxy):
    """A drop-in for ``onnxruntime.InferenceSession`` whose model lives in a process of its own.

    Nothing is loaded until the first use.  All proxies of one model (the same file, options and providers)
    share one worker process; calls from many threads run at the same time.

    Args:
        model_path: path of an .onnx or .ort file (str or PathLike), or the serialized model as bytes; also
            accepted by onnxruntime's own name, ``path_or_bytes``.
        sess_options: an ``onnxruntime.SessionOptions``, read now: later changes have no effect, except to
            the memory of initializers that it was given.
        providers: names, or (name, options) pairs, in order of preference.
        ttl: seconds without use after which the worker ends, as int, float or text such as ``"90s"`` or
            ``"5m"``; -1: never; 0: after each use.  The longest TTL of the proxies that used a model counts.
            For callers of onnxruntime's own signature a fourth positional argument that is a list is taken
            for ``provider_options``.
        provider_options: one dict per provider.
        host: the :class:`~onnx_dl.host.model_host.ModelHost` to use instead of the application's own.
        latency: ``"low"``: while calls follow each other within a fraction of a millisecond, both ends look
            for messages for at most 0.3 ms before they sleep: two wake-ups fewer per call, two busy cores
            meanwhile.  For small inputs and results; with megabytes it can be slower.  ``"normal"``: never.
        pin: the model is not evicted to make room for others while this proxy holds it.
        priority: of models that are idle, those of a lower one make room first.
        max_memory: bytes, or text such as ``"300MB"``: a worker that has more memory of its own after a call
            is replaced by another before the next; nobody sees an error, however much a run takes.  Its peak
            is that and what one run takes.
        max_memory_hard: bytes or text: a worker that has more than that during a run is ended, and its
            callers get :class:`~onnx_dl.errors.MemoryLimitExceeded`; None: no run is ended.  Looked at every
            10 ms while a call is under way, so that what a run takes within less is seen late.  Without
            ``max_memory``, it is that, too.
        max_runs: calls after which a worker is replaced by another.
        group: a name: all models of a host that have the same live in one worker, and are loaded, limited and
            unloaded together.  It costs less memory than several, a CUDA context each above all; a crash of
            one is a crash of all, and memory comes back only for all.
        environment: variables for this model's worker, by name, such as ``{"OMP_NUM_THREADS": "4"}``; None as
            a value: the worker does not have it.  They are set before its interpreter starts, so that
            what reads them at its start heeds them; its load takes as long as without forking.  Proxies of
            one file with other environments have other workers.
        eager: load the model now, so that what is wrong with it is raised here, as onnxruntime does.
        **kwargs: ``enable_fallback``, ``read_config_from_model`` and ``disabled_optimizers`` are passed on;
            others are ignored, as onnxruntime does.

    Raises:
        ValueError: ``ttl`` is none of the three modes, ``latency`` or ``pin`` neither of its two,
            ``priority`` no whole number, or a limit none.
        TypeError: the model is neither a path nor bytes.
        ConfigError: an option cannot reach a worker, or a variable cannot be set; the message names it.
        onnxruntime's NoSuchFile: there is no such file.  Unless ``eager``, a file that is not a model is
            refused at first use.
    """

    def __init__(
        self,
        model_path: str | bytes | os.PathLike[str] = _MISSING,  # type: ignore[assignment]
        sess_options: Any = None,
        providers: Sequence[Any] | None = None,
        ttl: float | str | Sequence[Any] | None = -1,
        provider_options: Sequence[Any] | None = None,
        *,
        path_or_bytes: str | bytes | os.PathLike[str] = _MISSING,  # type: ignore[assignment]
        host: ModelHost | None = None,
        latency: str = "normal",
        pin: bool = False,
        priority: int = 0,
        max_memory: int | str | None = None,
        max_memory_hard: int | str | None = None,
        max_runs: int | None = None,
        group: str | None = None,
        environment: Mapping[str, str | None] | None = None,
        eager: bool = False,
        **kwargs: Any,
    ) -> None:
        if ttl is None or isinstance(ttl, list | tuple):
            provider_options = provider_options if ttl is None else ttl
            ttl = -1
        source = model_path if model_path is not _MISSING else path_or_bytes
        if source is _MISSING:
            raise TypeError("InferenceSessionProxy() needs a model: a path or the model's bytes")
        self._model_path, data = model_source.locate(source)
        self._arguments = (sess_options, kwargs)
        _warn_of_slips(kwargs)
        found = model_source.describe(
            self._model_path,
            data,
            sess_options,
            providers,
            provider_options,
            kwargs,
            parsing.parse_allowances(max_memory, max_memory_hard, max_runs),
            parsing.parse_group(group),
            parse_environment(environment),
        )
        terms = {"ttl": ttl, "latency": latency, "pin": pin, "priority": priority}
        super().__init__(found.spec, host=host, memory=found.memory, **terms)  # type: ignore[arg-type]
        self._live = found.live
        self._forget_metadata()
        self._falls_back: bool | None = None
        if eager:
            self.load()

    @classmethod
    def of_spec(cls, spec: ModelSpec, *, host: ModelHost, **terms: Any) -> Self:
        """A proxy of a model that somebody else has described; ``terms``: ttl, latency, pin and priority.

        Raises:
            ValueError: a term cannot be.
        """
        if strange := terms.keys() - {"ttl", "latency", "pin", "priority"}:
            raise ConfigError(
                f"{', '.join(sorted(strange))}: the host's file says how {spec.name!r} is loaded; "
                "only ttl, latency, pin and priority may be given with a name."
            )
        proxy = object.__new__(cls)
        ModelProxy.__init__(proxy, spec, host=host, **terms)
        proxy.__dict__.update(_model_path=spec.path, _falls_back=None)
        proxy.__dict__.update(_arguments=(None, {}), _live=None)
        proxy._forget_metadata()
        return proxy

    def _travelling(self) -> dict[str, Any]:
        own = ("_model_path", "_falls_back")
        # No SessionOptions can be pickled; the spec says all that they said.
        return {name: self.__dict__[name] for name in own} | {"_arguments": (None, {}), "_live": None}

    def __copy__(self) -> Self:
        made = super().__copy__()
        made._arguments, made._live = self._arguments, self._live
        return made

    # --- running ------------------------------------------------------------------------------------------

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: dict[str, Any],
        run_options: Any = None,
        *,
        timeout: float | None = None,
    ) -> list[Any]:
        """One inference, as ``onnxruntime.InferenceSession.run``.

        Args:
            output_names: names of the outputs to compute; None or empty: all.
            input_feed: a value per input name: an array of any shape and fixed-size dtype, a text array, an
                OrtValue, a list or dict where the model takes sequences or maps, None for an absent optional.
            run_options: an ``onnxruntime.RunOptions``, read now; setting its ``terminate`` in another thread
                ends the run.
            timeout: seconds after which the run is told to end; the start of the host, a load and all other
                waits count.  None: as long as it takes.

        Returns:
            One value per output, in order; arrays are writable, C-contiguous and the caller's own.

        Raises:
            RunTimeout: ``timeout`` passed.
            WorkerDied: the worker ended during the call.
            MemoryLimitExceeded: it did, because it had more memory than ``max_memory_hard``.
            Exception: what onnxruntime raises, as the same class with the same message.
        """
        feed = self._fed(input_feed)
        names = names_of(output_names)
        deadline = plain = watch = None
        if run_options is not None or timeout is not None:
            deadline = Deadline.of(parsing.parse_timeout(timeout))
            plain, watch = options.read_run_options(run_options), CancelWatch(run_options, deadline)
        try:
            result: list[Any] = self._model(deadline).run(self._lease, names, feed, plain, watch)
        except DeadlinePassed as passed:
            raise not_begun(deadline, passed) from None
        except Exception as error:
            self._fall_back(error)
            return self.run(names, input_feed, run_options, timeout=timeout)
        return result if names is None or len(names) < 2 else sharing(names, result)

    async def arun(
        self,
        output_names: Sequence[str] | None,
        input_feed: dict[str, Any],
        run_options: Any = None,
        *,
        timeout: float | None = None,
    ) -> list[Any]:
        """:meth:`run` for asyncio and trio, without a thread per call.  Cancelling it ends the run.

        Up to 32 calls of one model run at a time; others wait their turn.
        """
        asynchronous = importing("onnx_dl.client.awaited_calls")

        feed, names = self._fed(input_feed), names_of(output_names)
        plain = options.read_run_options(run_options)
        nbytes = sum(getattr(value, "nbytes", 0) for value in feed.values())
        # A supervisor that must be started first, or a load, is not the event loop's to wait for.
        result: list[Any] = await asynchronous.call(
            self._bound() or self._model,
            self._lease,
            lambda lane: lane.codec.encode_call(names, feed, plain),
            nbytes,
            parsing.parse_timeout(timeout),
            run_options,
        )
        return result if names is None else sharing(names, result)

    def run_async(
        self,
        output_names: Sequence[str] | None,
        input_feed: dict[str, Any],
        callback: Callable[[Any, Any, str], object],
        user_data: Any,
        run_options: Any = None,
        *,
        timeout: float | None = None,
    ) -> None:
        """onnxruntime's own: returns at once; ``callback(results, user_data, error)`` is called in another
        thread, one that other callbacks share.  For coroutines there is :meth:`arun`.

        ``timeout``: seconds after which the run is told to end, and the callback is told so.

        Raises:
            RunTimeout: ``timeout`` passed before the run began.
            Exception: what is known to be wrong before that.
        """
        if not (callback is None or callable(callback)):
            raise TypeError(f"run_async(): incompatible function arguments. {callback!r} is no function.")
        deadline = Deadline.of(parsing.parse_timeout(timeout))
        feed, names = self._fed(input_feed), names_of(output_names)
        plain = options.read_run_options(run_options)
        try:
            callback_calls.call_back(
                self._model(deadline),
                self._lease,
                lambda lane: lane.codec.encode_call(names, feed, plain, background=True),
                callback_calls.Callback(callback, user_data, run_options, deadline, feed),
            )
        except DeadlinePassed as passed:
            raise not_begun(deadline, passed) from None

    def run_with_ort_values(
        self,
        output_names: Sequence[str] | None,
        input_dict_ort_values: dict[str, Any],
        run_options: Any = None,
    ) -> list[Any]:
        """One inference with an ``onnxruntime.OrtValue`` per input, whose results are OrtValues."""
        feed, names = self._owned(input_dict_ort_values), names_of(output_names)
        native = {name: value._get_c_value() for name, value in feed.items()}
        if run_options is None and (found := self._with_arrays(names, feed, native)) is not None:
            return found
        try:
            found = self._call("run_with_ort_values", names, feed, run_options=run_options)
        except Exception as error:
            self._fall_back(error)
            return self.run_with_ort_values(names, input_dict_ort_values, run_options)
        return list(found) if names is None else sharing(names, found)

    def _with_arrays(self, names: Any, feed: dict[str, Any], native: dict[str, Any]) -> list[Any] | None:
        """The way of ``run()``, which is faster; None if it will not do, or must not tell what is wrong."""
        if names is not None and not (type(names) is list and are_names(names)):
            return None
        types = {node.name: node.type for node in self.get_outputs()}
        wanted = list(types) if names is None else names
        arrays = {name: ortvalues.as_array(value, feed[name]) for name, value in native.items()}
        if any(array is None for array in arrays.values()) or len(set(wanted)) != len(wanted):
            return None
        if not all(types.get(name) in ortvalues.NUMERIC for name in wanted):
            return None
        try:
            results = self._run_plainly(wanted, arrays)
            if not all(type(result) is np.ndarray for result in results):  # sparse ones say they are tensors
                return None
        except OnnxDLError:
            raise  # not onnxruntime's: to run again would tell nothing else
        except Exception:
            return None
        return [ortvalues.put_together("OrtValue", [ortvalues.from_array(r)], copy=True) for r in results]

    def run_with_ortvaluevector(
        self,
        run_options: Any,
        feed_names: Sequence[str],
        feeds: Any,
        fetch_names: Sequence[str],
        fetches: Any,
        fetch_devices: Sequence[Any],
    ) -> None:
        """One inference with ``OrtValueVector``; ``fetches`` is filled with the results, or, if it holds
        values, these are written to."""
        if type(run_options).__name__ != "RunOptions" or {type(feeds), type(fetches)} != {vector_class()}:
            raise TypeError(
                "run_with_ortvaluevector(): incompatible function arguments. It takes RunOptions, and an "
                "OrtValueVector for feeds and for fetches."
            )
        given = list(fetches)
        found = self._call(
            "run_with_ortvaluevector",
            list(feed_names),
            list(feeds),
            list(fetch_names),
            [place_of(value) for value in given],
            len(fetch_devices),
            run_options=run_options,
        )
        for value in take_results(given, found):
            fetches.push_back(value)

    def io_binding(self) -> IOBinding:
        """A binding of inputs and outputs to memory of this process."""
        if self._is_gone:
            raise AttributeError("'NoneType' object has no attribute 'is_webgpu_graph_capture_enabled'")
        return IOBinding(self)

    def run_with_iobinding(self, iobinding: Any, run_options: Any = None) -> None:
        """One inference with what is bound; results go where outputs are bound.

        Raises:
            ValueError: the binding is another session's.
            RuntimeError: what onnxruntime refuses.
        """
        if iobinding._session is not self._sess:
            raise ValueError("IOBinding must be used with the session that created it.")
        if run_options is not None or not iobinding._run_plainly(self._run_plainly):
            iobinding._run(lambda *args: self._call("run_with_iobinding", *args, run_options=run_options))

    def _run_plainly(self, names: list[str], feed: dict[str, Any]) -> list[Any]:
        """One inference with arrays only."""
        if self._live is not None:
            self._live.refresh()
        result: list[Any] = self._model().run(self._lease, names, feed, None)
        return result

    def create_ortvalue_from_shape_and_type(
        self,
        shape: Sequence[int],
        element_type: Any,
        device_type: str,
        device_id: int = 0,
        vendor_id: int = -1,
    ) -> Any:
        """An OrtValue in this process that only this session takes; imports onnxruntime."""
        import onnxruntime

        kind = element_type if isinstance(element_type, int) else np.dtype(element_type).str
        self._invoke("check_ortvalue", list(shape), kind, device_type, device_id, int(vendor_id))
        made = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            shape, element_type, device_type, device_id, vendor_id
        )
        made._session = self._sess
        return made

    def _fed(self, feed: Any) -> dict[str, Any]:
        """The feed as a dict; initializers that the application changed are up to date after this."""
        if self._live is not None:
            self._live.refresh()
        found = {plain_name(name): feed[name] for name in feed.keys()}  # noqa: SIM118  # a list has none
        for value in found.values():
            if type(value) is not np.ndarray:
                self._check_owner(value)
            elif value.dtype.num >= USERS:
                refuse_dtypes(found, lambda fed: self._model().run(self._lease, None, fed, None))
        return found

    def _owned(self, feed: Any) -> dict[str, Any]:
        check_names(feed, self.get_inputs())
        for value in feed.values():
            self._check_owner(value)
        return dict(feed)

    def _check_owner(self, value: Any, action: str = "used with") -> None:
        owner = getattr(value, "_session", None)
        if owner is not None and owner is not self._sess and type(value).__name__ == "OrtValue":
            raise ValueError(f"Session-scoped OrtValue must be {action} the session that created it.")

    def _call(self, method: str, *args: Any, run_options: Any) -> Any:
        if self._live is not None:
            self._live.refresh()
        plain = options.read_run_options(run_options)
        watch = None if run_options is None else CancelWatch(run_options)
        return self._model().invoke(self._lease, method, *args, plain, watch=watch)

    def _run_kept(
        self, output_names: Sequence[str], feed: dict[str, Any], run_options: Any
    ) -> RetainedOutputs:
        """:meth:`run` for a :class:`~onnx_dl.session.pipeline.Pipeline`, whose next stage reads the results."""
        plain = options.read_run_options(run_options)
        return self._model().keep(self._lease, output_names, self._fed(feed), plain)

    # --- changing the session -----------------------------------------------------------------------------

    def set_providers(
        self, providers: Sequence[Any] | None = None, provider_options: Sequence[Any] | None = None
    ) -> None:
        """Loads the model anew with these providers.  Other proxies of it keep theirs.

        Raises: what onnxruntime raises; the session is of no use then, until providers are set that work.
        """
        self._finalizer()
        self._forget_metadata()
        lease = self._lease
        self._lease = Lease(lease.ttl, lease.latency, lease.pin, lease.priority)
        try:
            self._take(model_source.with_providers(self._spec, providers, provider_options), self._given())
            self.load()
        except BaseException:
            self._is_gone = True
            raise

    def _reset_session(self, providers: Any, provider_options: Any) -> None:
        """What subclasses of onnxruntime's class call."""
        self.set_providers(providers, provider_options)

    def disable_fallback(self) -> None:
        """A run that fails in an execution provider raises."""
        self._falls_back = False

    def enable_fallback(self) -> None:
        """A run that fails in an execution provider is made again with other providers."""
        self._falls_back = True

    def _fall_back(self, error: Exception) -> None:
        """Sets other providers if a provider failed and that is wanted, else raises the error again."""
        if type(error).__name__ != "EPFail" or not self._enable_fallback:
            raise error
        print(f"EP Error: {error!s} using {self.get_providers()}")
        print(f"Falling back to {self._fallback_providers} and retrying.")
        self.set_providers(self._fallback_providers)
        self.disable_fallback()

    def set_ep_dynamic_options(self, options: dict[str, str]) -> None:
        """Options of execution providers that may change; for all proxies of the model, until it unloads."""
        self._invoke("set_ep_dynamic_options", options)

    def get_tuning_results(self) -> Any:
        """What tunable operators found, as onnxruntime gives it."""
        return self._invoke("get_tuning_results")

    def set_tuning_results(self, results: Any, *, error_on_invalid: bool = False) -> None:
        """Gives tunable operators what was found before."""
        self._invoke("set_tuning_results", results, error_on_invalid)

    def release_captured_graph(self, graph_annotation_id: int = 0) -> None:
        """Releases a graph that a provider captured."""
        self._invoke("release_captured_graph", graph_annotation_id)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """``isinstance(proxy, onnxruntime.InferenceSession)`` holds, because packages ask."""
        onnxruntime = sys.modules.get("onnxruntime")
        return getattr(onnxruntime, "InferenceSession", None) or InferenceSessionProxy

    # --- inside -------------------------------------------------------------------------------------------

    @property
    def _model_bytes(self) -> bytes | None:
        """As onnxruntime has it: the model if it was given as bytes.  A copy, made anew each time."""
        return None if self._spec.blob is None else bytes_of(self._given()[self._spec.blob]())

    def _check_installation(self) -> None:
        installation.check(self._spec.provider_names)


_OURS: Final = frozenset(inspect.signature(InferenceSessionProxy.__init__).parameters) - {"self", "kwargs"}


def _warn_of_slips(kwargs: dict[str, Any]) -> None:
    """onnxruntime ignores arguments that it does not know; one that was meant for us would be lost unseen."""
    for name in kwargs.keys() - model_source.KNOWN:
        if near := difflib.get_close_matches(name, _OURS, 1, 0.75):
            warnings.warn(f"{name} is no argument of a session; did you mean {near[0]}?", stacklevel=3)


InferenceSession = InferenceSessionProxy
