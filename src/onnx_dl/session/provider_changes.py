"""Changes of a session: its execution providers, also after one has failed, and options of theirs."""

from __future__ import annotations

from onnx_dl.core.types import Providers, Value
from onnx_dl.session import model_source
from onnx_dl.session.introspection import MetadataProxy
from onnx_dl.session.model_handle import ModelHandle
from onnx_dl.session.model_source import Source


class ProviderProxy(MetadataProxy):
    """A proxy with the methods of ``onnxruntime.InferenceSession`` that change the session."""

    _falls_back: bool | None = None
    """Fallback to other providers as last set; None: as the session's options say."""

    def __getstate__(self) -> tuple[object, ...]:
        return (self._falls_back,)

    def __setstate__(self, state: tuple[ModelHandle, bool | None]) -> None:
        handle, self._falls_back = state
        self._set_up(handle)

    def set_providers(self, providers: Providers = None, provider_options: Providers = None) -> None:
        """Loads the model anew with these providers.  Other proxies of it keep theirs.

        Raises: what onnxruntime raises; the session is unusable then, until providers are set that work.
        """
        old = self._handle
        old.release()
        try:
            spec = model_source.with_providers(old.spec, providers, provider_options)
            self._set_up(ModelHandle(Source(spec, old.blobs(), old.live), old.lease.terms, old.host))
            self.load()
        except BaseException:
            self._handle.give_up_session()
            raise

    def _reset_session(self, providers: Providers, provider_options: Providers) -> None:
        """onnxruntime's private method, which subclasses of its class call."""
        self.set_providers(providers, provider_options)

    def disable_fallback(self) -> None:
        """A run that fails in an execution provider raises."""
        self._falls_back = False

    def enable_fallback(self) -> None:
        """A run that fails in an execution provider is made again with other providers."""
        self._falls_back = True

    @property
    def _enable_fallback(self) -> bool:
        return (
            bool(self._metadata.read().details["fallback"]) if self._falls_back is None else self._falls_back
        )

    @property
    def _fallback_providers(self) -> list[str]:
        return list(self._metadata.read().details["fallback_providers"])

    def _fall_back(self, error: Exception) -> None:
        """Sets other providers if a provider failed and that is wanted, else raises the error again."""
        if type(error).__name__ != "EPFail" or not self._enable_fallback:
            raise error
        print(f"EP Error: {error!s} using {self.get_providers()}")
        print(f"Falling back to {self._fallback_providers} and retrying.")
        self.set_providers(self._fallback_providers)
        self.disable_fallback()

    def set_ep_dynamic_options(self, options: dict[str, str]) -> None:
        """Changes options of execution providers; for all proxies of the model, until it unloads."""
        self._invoke("set_ep_dynamic_options", options)

    def get_tuning_results(self) -> Value:
        """Results of tunable operators, as onnxruntime gives them."""
        return self._invoke("get_tuning_results")

    def set_tuning_results(self, results: Value, *, error_on_invalid: bool = False) -> None:
        """Gives tunable operators the results of an earlier session."""
        self._invoke("set_tuning_results", results, error_on_invalid)

    def release_captured_graph(self, graph_annotation_id: int = 0) -> None:
        """Releases a graph that a provider captured."""
        self._invoke("release_captured_graph", graph_annotation_id)
