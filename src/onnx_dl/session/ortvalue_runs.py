"""Runs whose inputs and results are onnxruntime's OrtValues.

Dense tensors of numbers go the way of ``run()``, which is faster, or, if some are on a GPU, the way of a
binding.  Other values, and calls that fail there, go to the worker as OrtValues, so that errors are in
onnxruntime's words.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import DTypeLike

from onnx_dl.client import numbered_runs
from onnx_dl.client.cancellation import CancelWatch
from onnx_dl.client.served_model import ServedModel
from onnx_dl.core.types import Array, Feed, OrtObject, PlainDict, Value
from onnx_dl.errors import OnnxDLError
from onnx_dl.ort import options, ortvalues
from onnx_dl.session.bound_outputs import BoundOutput, place_of, take_results
from onnx_dl.session.device_memory import check_writable, is_on
from onnx_dl.session.inputs import are_names, check_names, check_owner, names_of, sharing
from onnx_dl.session.introspection import SessionProxy
from onnx_dl.session.io_binding import IOBinding, vector_class
from onnx_dl.tensors.device_values import BOUND_RUN, CUDA

_GPU: Final = 1
"""``OrtDevice.device_type()`` of a GPU."""


class OrtValueProxy(SessionProxy):
    """A proxy with the methods of ``onnxruntime.InferenceSession`` that run with OrtValues and bindings."""

    def run_with_ort_values(
        self,
        output_names: Sequence[str] | None,
        input_dict_ort_values: Feed,
        run_options: OrtObject = None,
    ) -> list[OrtObject]:
        """One inference with an ``onnxruntime.OrtValue`` per input, whose results are OrtValues."""
        try:
            return self._run_values(output_names, input_dict_ort_values, run_options)
        except Exception as error:
            self._fall_back(error)
            return self.run_with_ort_values(output_names, input_dict_ort_values, run_options)

    def _run_values(
        self, output_names: Sequence[str] | None, given: Feed, run_options: OrtObject
    ) -> list[Value]:
        check_names(given, self._metadata.read().inputs)
        for value in given.values():
            check_owner(value, self._sess)
        feed, names = dict(given), names_of(output_names)
        native = {name: value._get_c_value() for name, value in feed.items()}
        if run_options is None and (found := self._run_as_arrays(names, feed, native)) is not None:
            return found
        if (found := self._run_from_gpu(names, feed, native, run_options)) is not None:
            return found
        found = self._call("run_with_ort_values", names, feed, run_options=run_options)
        return list(found) if names is None else sharing(names, found)

    def _run_as_arrays(self, names: list[str] | None, feed: Feed, native: Feed) -> list[OrtObject] | None:
        """The way of ``run()``; None if it does not do."""
        wanted = self._numeric(names)
        arrays = {name: ortvalues.as_array(value, feed[name]) for name, value in native.items()}
        if wanted is None or any(array is None for array in arrays.values()):
            return None
        try:
            results = self._run_arrays(wanted, arrays)
        except OnnxDLError:
            raise  # not onnxruntime's: the other way would raise the same
        except Exception:
            return None
        if not all(type(result) is np.ndarray for result in results):  # sparse ones have the type of tensors
            return None
        return [ortvalues.put_together("OrtValue", [ortvalues.from_array(r)], copy=True) for r in results]

    def _run_from_gpu(
        self, names: list[str] | None, feed: Feed, native: Feed, run_options: OrtObject
    ) -> list[OrtObject] | None:
        """The way of a binding, which sends handles of inputs on a GPU; None if it does not do.  Results are
        on the CPU, as in-process."""
        wanted = self._numeric(names) if self._handle.spec.isolation else None
        if wanted is None or not any(is_on(value, CUDA) for value in native.values()):
            return None
        outputs = {name: BoundOutput("cpu", 0) for name in wanted}
        binding = self._run_values_bound(run_options, native, list(feed.values()), outputs)
        return None if binding is None else binding.get_outputs()

    def _run_values_bound(
        self, run_options: OrtObject, inputs: Feed, owners: Iterable[object], outputs: dict[str, BoundOutput]
    ) -> IOBinding | None:
        """Runs native OrtValues by a binding of their own, and returns it; None if onnxruntime refuses."""
        binding = IOBinding(self)
        binding._bind_for_one_run(inputs, owners, outputs)
        try:
            binding.run(
                lambda *bound: self._call("run_with_iobinding", *bound, run_options=run_options), None
            )
        except OnnxDLError:
            raise  # not onnxruntime's: the other way would raise the same
        except Exception:
            return None
        return binding

    def _numeric(self, names: list[str] | None) -> list[str] | None:
        """The outputs that are asked for; None if some of them are no tensors of numbers, or none at all."""
        if names is not None and not (type(names) is list and are_names(names)):
            return None
        types = {node.name: node.type for node in self._metadata.read().outputs}
        wanted = list(types) if names is None else names
        if len(set(wanted)) != len(wanted) or not all(types.get(n) in ortvalues.NUMERIC for n in wanted):
            return None
        return wanted

    def run_with_ortvaluevector(
        self,
        run_options: OrtObject,
        feed_names: Sequence[str],
        feeds: OrtObject,
        fetch_names: Sequence[str],
        fetches: OrtObject,
        fetch_devices: Sequence[OrtObject],
    ) -> None:
        """One inference with ``OrtValueVector``.  Results are written to the values of ``fetches``, or, if it
        has none, appended to it."""
        if type(run_options).__name__ != "RunOptions" or {type(feeds), type(fetches)} != {vector_class()}:
            raise TypeError(
                "run_with_ortvaluevector(): incompatible function arguments. It takes RunOptions, and an "
                "OrtValueVector for feeds and for fetches."
            )
        given = list(fetches)
        for value in given:
            check_writable(value)
        made = self._run_vectors_on_gpu(
            run_options, list(feed_names), list(feeds), list(fetch_names), given, fetch_devices
        )
        if made is None:
            found = self._call(
                "run_with_ortvaluevector",
                list(feed_names),
                list(feeds),
                list(fetch_names),
                [place_of(value) for value in given],
                len(fetch_devices),
                run_options=run_options,
            )
            made = take_results(given, found)
        for value in made:
            fetches.push_back(value)

    def _run_vectors_on_gpu(
        self,
        run_options: OrtObject,
        names: list[str],
        feeds: list[OrtObject],
        wanted: list[str],
        given: list[OrtObject],
        devices: Sequence[OrtObject],
    ) -> list[OrtObject] | None:
        """Runs by a binding, and returns results that are not in ``given``; None if that does not do, or
        nothing is on a GPU."""
        on_gpu = [getattr(device, "device_type", int)() == _GPU for device in devices]
        if not (self._handle.spec.isolation and (any(on_gpu) or any(is_on(v, CUDA) for v in feeds + given))):
            return None
        are_matched = len(names) == len(feeds) == len(set(names)) and len(given) in (0, len(wanted))
        if not are_matched or self._numeric(wanted) is None or len(devices) != len(wanted):
            return None
        outputs = {
            name: BoundOutput("cpu", 0, given[index])
            if given
            else BoundOutput(*(CUDA, devices[index].device_id()) if on_gpu[index] else ("cpu", 0))
            for index, name in enumerate(wanted)
        }
        inputs = dict(zip(names, feeds, strict=True))
        binding = self._run_values_bound(run_options, inputs, feeds, outputs)
        return None if binding is None else list(binding.get_outputs_as_ortvaluevector())[len(given) :]

    def io_binding(self) -> IOBinding:
        """A binding of inputs and outputs to memory of this process."""
        if self._handle.is_gone:
            raise AttributeError("'NoneType' object has no attribute 'is_webgpu_graph_capture_enabled'")
        return IOBinding(self)

    def run_with_iobinding(self, iobinding: IOBinding, run_options: OrtObject = None) -> None:
        """One inference with the bound inputs; results are written to the bound outputs.

        Raises:
            ValueError, RuntimeError: the binding is another session's, or onnxruntime refuses it.
        """
        if iobinding._session is not self._sess:
            raise ValueError("IOBinding must be used with the session that created it.")
        if run_options is None and iobinding.run_again(self._repeat_bound):
            return
        if run_options is not None or not iobinding.run_plainly(self._run_arrays):
            iobinding.run(
                lambda *bound: self._call("run_with_iobinding", *bound, run_options=run_options),
                self._run_bound if run_options is None else None,
            )

    def create_ortvalue_from_shape_and_type(
        self,
        shape: Sequence[int],
        element_type: DTypeLike | int,
        device_type: str,
        device_id: int = 0,
        vendor_id: int = -1,
    ) -> OrtObject:
        """An OrtValue in this process that only this session takes; imports onnxruntime."""
        import onnxruntime

        kind = element_type if isinstance(element_type, int) else np.dtype(element_type).str
        self._invoke("check_ortvalue", list(shape), kind, device_type, device_id, int(vendor_id))
        made = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            shape, element_type, device_type, device_id, vendor_id
        )
        made._session = self._sess
        return made

    def _repeat_bound(self, number: int) -> bool:
        return numbered_runs.repeat(self._refreshed(), self._handle.lease, number)

    def _run_bound(self, number: int, *bound: object) -> str | None:
        if not bound:
            return None if self._repeat_bound(number) else ""
        found: str | None = self._refreshed().invoke(self._handle.lease, BOUND_RUN, number, *bound)
        return found

    def _run_arrays(self, names: list[str], feed: Feed) -> list[Array]:
        handle = self._handle
        if (model := handle.used) is not None and handle.live is None:
            repeated: list[Array] | None = model.repeat(handle.lease, names, feed)
            if repeated is not None:
                return repeated
        result: list[Array] = self._refreshed().run(handle.lease, names, feed, None)
        return result

    def _call(self, method: str, *args: object, run_options: OrtObject) -> list[Value]:
        plain: PlainDict | None = options.read_run_options(run_options)
        watch = None if run_options is None else CancelWatch(run_options)
        model = self._refreshed()
        result: list[Value] = model.invoke(self._handle.lease, method, *args, plain, watch=watch)
        return result

    def _refreshed(self) -> ServedModel:
        """The model, with initializers as the application has them now."""
        if self._handle.live is not None:
            self._handle.live.refresh()
        return self._handle.model()
