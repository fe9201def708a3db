"""Runs whose inputs and results are onnxruntime's OrtValues: ``run_with_ort_values()`` and its kin.

Dense tensors of numbers go the way of ``run()``, which is faster.  Other values, and calls that fail there,
go to the worker as OrtValues, so that errors are in onnxruntime's words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import DTypeLike

from onnx_dl.client.cancellation import CancelWatch
from onnx_dl.core.types import Array, Feed, OrtObject, PlainDict, Value
from onnx_dl.errors import OnnxDLError
from onnx_dl.ort import options, ortvalues
from onnx_dl.ort.metadata import Description
from onnx_dl.session.inputs import are_names, check_names, check_owner, names_of, sharing
from onnx_dl.session.io_binding import IOBinding, place_of, take_results, vector_class
from onnx_dl.session.model_handle import ModelHandle
from onnx_dl.session.native_session import NativeSession


class OrtValueRuns:
    """Runs of one session.  It does not refer to the proxy, which would then live until a collection."""

    def __init__(
        self, handle: ModelHandle, session: NativeSession, metadata: Callable[[], Description]
    ) -> None:
        """``session``: the owner of session-scoped OrtValues and bindings; ``metadata``: reads it."""
        self._handle = handle
        self._session = session
        self._metadata = metadata

    def with_ort_values(
        self, output_names: Sequence[str] | None, given: Feed, run_options: OrtObject
    ) -> list[Value]:
        """``run_with_ort_values()``."""
        check_names(given, self._metadata().inputs)
        for value in given.values():
            check_owner(value, self._session)
        feed, names = dict(given), names_of(output_names)
        native = {name: value._get_c_value() for name, value in feed.items()}
        if run_options is None and (found := self._with_arrays(names, feed, native)) is not None:
            return found
        found = self._call("run_with_ort_values", names, feed, run_options=run_options)
        return list(found) if names is None else sharing(names, found)

    def _with_arrays(self, names: list[str] | None, feed: Feed, native: Feed) -> list[OrtObject] | None:
        """The way of ``run()``; None if it does not do."""
        if names is not None and not (type(names) is list and are_names(names)):
            return None
        types = {node.name: node.type for node in self._metadata().outputs}
        wanted = list(types) if names is None else names
        arrays = {name: ortvalues.as_array(value, feed[name]) for name, value in native.items()}
        if any(array is None for array in arrays.values()) or len(set(wanted)) != len(wanted):
            return None
        if not all(types.get(name) in ortvalues.NUMERIC for name in wanted):
            return None
        try:
            results = self.plain(wanted, arrays)
            if not all(
                type(result) is np.ndarray for result in results
            ):  # sparse ones have the type of tensors
                return None
        except OnnxDLError:
            raise  # not onnxruntime's: the other way would raise the same
        except Exception:
            return None
        return [ortvalues.put_together("OrtValue", [ortvalues.from_array(r)], copy=True) for r in results]

    def with_vectors(
        self,
        run_options: OrtObject,
        feed_names: Sequence[str],
        feeds: OrtObject,
        fetch_names: Sequence[str],
        fetches: OrtObject,
        fetch_devices: Sequence[OrtObject],
    ) -> None:
        """``run_with_ortvaluevector()``."""
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

    def with_binding(self, binding: IOBinding, run_options: OrtObject) -> None:
        """``run_with_iobinding()``."""
        if binding._session is not self._session:
            raise ValueError("IOBinding must be used with the session that created it.")
        if run_options is not None or not binding.run_plainly(self.plain):
            binding.run(lambda *bound: self._call("run_with_iobinding", *bound, run_options=run_options))

    def new_value(
        self,
        shape: Sequence[int],
        element_type: DTypeLike | int,
        device_type: str,
        device_id: int,
        vendor_id: int,
    ) -> OrtObject:
        """An OrtValue in this process that only this session takes; imports onnxruntime."""
        import onnxruntime

        kind = element_type if isinstance(element_type, int) else np.dtype(element_type).str
        self._handle.invoke("check_ortvalue", list(shape), kind, device_type, device_id, int(vendor_id))
        made = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            shape, element_type, device_type, device_id, vendor_id
        )
        made._session = self._session
        return made

    def plain(self, names: list[str], feed: Feed) -> list[Array]:
        """One inference with arrays only."""
        handle = self._handle
        if handle.live is not None:
            handle.live.refresh()
        result: list[Array] = handle.model().run(handle.lease, names, feed, None)
        return result

    def _call(self, method: str, *args: object, run_options: OrtObject) -> list[Value]:
        handle = self._handle
        if handle.live is not None:
            handle.live.refresh()
        told: PlainDict | None = options.read_run_options(run_options)
        watch = None if run_options is None else CancelWatch(run_options)
        result: list[Value] = handle.model().invoke(handle.lease, method, *args, told, watch=watch)
        return result
