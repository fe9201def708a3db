"""Models in a row: each one reads results of the ones before it.

Decides which output goes to which input.  The arrays between two models stay in shared memory: the next
worker reads them where the one before wrote them, and the application neither copies nor maps them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

from onnx_dl.concurrency.forking import lazily
from onnx_dl.core.types import Feed, OrtObject, Value
from onnx_dl.errors import ConfigError
from onnx_dl.ort import options
from onnx_dl.ort.metadata import NodeArg
from onnx_dl.session.inference_session import InferenceSessionProxy


class Pipeline:
    """Runs models one after the other.

    Args:
        stages: proxies of one host, in order.
        connect: for each stage after the first, a mapping from names of its inputs to names of outputs of
            earlier stages.  With two stages it may be the one mapping, such as ``{"x": "crops"}``.  An
            input that is not named is connected to the output of the same name; of several, to the latest.
            If no name is equal, a single input is connected to the single output of the stage before.  All
            other inputs are inputs of the pipeline.

    Raises:
        ConfigError: there is no stage, a stage is not a session of onnx_dl, the stages are of different
            hosts, or ``connect`` has another length.
            Names that do not exist are refused at first use, because that needs the models.
    """

    def __init__(
        self,
        *stages: InferenceSessionProxy,
        connect: Sequence[Mapping[str, str]] | Mapping[str, str] | None = None,
    ) -> None:
        if not stages:
            raise ConfigError("A pipeline needs at least one model.")
        for stage in stages:
            if not hasattr(stage, "_handle"):  # a session that patch() made has one, and another class
                raise ConfigError(
                    "A stage of a pipeline is a session of onnx_dl; this is of the class "
                    f"{type(stage).__module__}.{type(stage).__qualname__}. Give the sessions one by one: "
                    "pipeline(first, second)."
                )
        if isinstance(connect, Mapping):
            connect = [connect]
        if connect is not None and len(connect) != len(stages) - 1:
            raise ConfigError(
                f"connect= needs one mapping for each of the {len(stages) - 1} stages after the first; "
                f"it has {len(connect)}."
            )
        if len({id(stage._handle.host) for stage in stages}) > 1:
            raise ConfigError("All stages of a pipeline must be proxies of the same host.")
        self._stages = stages
        self._stay = len({stage._handle.spec.isolation for stage in stages}) == 1
        """True if results can stay where they are: all stages run in workers, or all in this process."""
        self._connect = [dict(names) for names in connect or [{}] * (len(stages) - 1)]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {' -> '.join(map(repr, self._stages))}>"

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Value],
        run_options: OrtObject = None,
    ) -> list[Value]:
        """One inference through all stages.

        Args:
            output_names: outputs of the last stage; None or empty: all.
            input_feed: a value for each of :meth:`get_inputs`, by name; a name that several stages have feeds
                all of them.
            run_options: an ``onnxruntime.RunOptions`` for every stage.

        Returns:
            Like the last stage's ``run()``.

        Raises:
            ValueError: an input is missing, or is none of the pipeline's, in onnxruntime's words.
            Exception: a stage raised it.
        """
        self._check(input_feed)
        plain = options.read_run_options(run_options)
        computed: list[Feed] = []
        with contextlib.ExitStack() as kept:
            for index, stage in enumerate(self._stages[:-1]):
                names = self._needed(index)
                feed = stage._as_feed(self._feed(index, input_feed, computed))
                if not self._stay:
                    computed.append(dict(zip(names, stage.run(names, feed, run_options), strict=True)))
                    continue
                results = stage._handle.model().keep(stage._handle.lease, names, feed, plain)
                kept.callback(results.release)
                computed.append(dict(zip(names, results.values, strict=True)))
            feed = self._feed(len(self._stages) - 1, input_feed, computed)
            return self._stages[-1].run(output_names, feed, run_options)

    def get_inputs(self) -> list[NodeArg]:
        """The inputs that no stage feeds.  Loads models that never were loaded."""
        nodes: dict[str, NodeArg] = {}
        for stage, wired in zip(self._stages, self._wires, strict=True):
            for node in stage.get_inputs():
                if node.name not in wired:
                    nodes.setdefault(node.name, node)
        return list(nodes.values())

    def get_outputs(self) -> list[NodeArg]:
        """The outputs of the last stage."""
        return self._stages[-1].get_outputs()

    # --- inside -------------------------------------------------------------------------------------------

    @lazily
    def _wires(self) -> list[dict[str, tuple[int, str]]]:
        """Inputs of each stage that earlier stages feed: stage and name of the output."""
        return [self._wire(index) for index in range(len(self._stages))]

    def _wire(self, index: int) -> dict[str, tuple[int, str]]:
        if not index:
            return {}
        offered = {
            node.name: (earlier, node.name)
            for earlier, stage in enumerate(self._stages[:index])
            for node in stage.get_outputs()
        }
        named = self._connect[index - 1]
        names = [node.name for node in self._stages[index].get_inputs()]
        if strange := [*(set(named) - set(names)), *(set(named.values()) - set(offered))]:
            raise ConfigError(
                f"connect= names {sorted(strange)}, which do not exist. Stage {index} has the inputs "
                f"{names}, and the stages before it have the outputs {sorted(offered)}."
            )
        wired = {name: offered[named.get(name, name)] for name in names if named.get(name, name) in offered}
        left = [name for name in names if name not in wired]
        before = self._stages[index - 1].get_outputs()
        if not wired and len(left) == 1 and len(before) == 1:
            wired[left[0]] = index - 1, before[0].name
        if not wired:
            raise ConfigError(
                f"No output of an earlier stage has the name of an input of stage {index}. Name an output "
                f"for an input, such as connect=[{{{(names or [''])[0]!r}: {before[0].name!r}}}]; "
                f"stage {index} has the inputs {names}, and the stages before it have the outputs "
                f"{sorted(offered)}."
            )
        return wired

    def _needed(self, index: int) -> list[str]:
        """The outputs of a stage that later ones read."""
        later = [source for wired in self._wires for source in wired.values()]
        return list(dict.fromkeys(name for stage, name in later if stage == index)) or [
            self._stages[index].get_outputs()[0].name
        ]

    def _feed(self, index: int, given: Mapping[str, Value], computed: list[Feed]) -> Feed:
        wired = {name: computed[stage][output] for name, (stage, output) in self._wires[index].items()}
        names = [node.name for node in self._stages[index].get_inputs()]
        return wired | {name: given[name] for name in names if name in given and name not in wired}

    def _check(self, given: Mapping[str, Value]) -> None:
        names = [node.name for node in self.get_inputs()]
        if missing := [name for name in names if name not in given]:
            raise ValueError(f"Required inputs ({missing}) are missing from input feed ({list(given)}).")
        if strange := [name for name in given if name not in names]:
            raise ValueError(f"Invalid input name: {strange[0]}; the pipeline has {names}.")


def pipeline(
    *stages: InferenceSessionProxy, connect: Sequence[Mapping[str, str]] | Mapping[str, str] | None = None
) -> Pipeline:
    """Makes a :class:`Pipeline`, which has the arguments and the errors.

    For example, ``pipeline(detector, reader, connect={"x": "crops"})`` feeds the detector's output ``crops``
    to the reader's input ``x``.
    """
    return Pipeline(*stages, connect=connect)
