"""ONNX's own backend tests, done by onnxruntime here and by a session of another kind: the same must come.

Right is what onnxruntime says in this process, bit for bit, errors included; not what the test expects.

    python -m tests.onnx_node --all [--jobs 2] [--only GLOB] [--modes run,ort] [--seed N] [--self]

A native crash ends only the process that has it: the case is reported, and the others go on.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import functools
import os
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, TensorProto, TypeProto
from onnx.backend.test.case import node
from onnx.backend.test.loader import DATA_DIR

from tests.onnx_values import CPU, PLAIN, attempt, feedable, is_plain, ort_value, picture

MakeSession = Callable[[bytes], Any]
FOLDERS = ("simple", "pytorch-operator", "pytorch-converted")
RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
META = ("custom_metadata_map", "description", "domain", "graph_description", "graph_name", "producer_name", "version")


# --- cases -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A model, and a value for each of its inputs."""

    name: str
    model: ModelProto
    values: dict[str, Any]

    @functools.cached_property
    def blob(self) -> bytes:
        """The model as both sessions get it."""
        return self.model.SerializeToString()

    @functools.cached_property
    def kinds(self) -> dict[str, TypeProto]:
        """The declared type of each input."""
        return {info.name: info.type for info in self.model.graph.input}

    @property
    def feed(self) -> dict[str, Any]:
        """As ``run`` takes it."""
        return {name: feedable(value) for name, value in self.values.items()}

    @functools.cached_property
    def ort_feed(self) -> dict[str, onnxruntime.OrtValue]:
        """As ``run_with_ort_values`` takes it."""
        return {name: ort_value(feedable(value), self.kinds[name]) for name, value in self.values.items()}

    @property
    def group(self) -> str:
        """What is special about it, so that a sample can have something of everything."""
        graph = self.model.graph
        kinds = [info.type for info in (*graph.input, *graph.output)]
        special = {kind.WhichOneof("value") for kind in kinds} - {"tensor_type"}
        if special:
            return sorted(special)[0]
        elements = {kind.tensor_type.elem_type for kind in kinds}
        if TensorProto.STRING in elements:
            return "string"
        return "narrow" if any(e >= TensorProto.BFLOAT16 for e in elements) else "plain"


@functools.cache
def cases() -> list[Case]:
    """All that the onnx package has: those that its code makes, and those in its files.  Takes 5 s."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own arithmetic
        np.random.seed(0)
        made = node.collect_testcases(None)
    return [_made(case) for case in made] + [_read(folder) for folder in _folders()]


def _made(case: Any) -> Case:
    (inputs, _), *_ = case.data_sets
    names = [info.name for info in case.model.graph.input]
    return Case(case.name, case.model, dict(zip(names, inputs, strict=False)))


def _folders() -> Iterable[Path]:
    return sorted(model.parent for kind in FOLDERS for model in Path(DATA_DIR, kind).glob("*/model.onnx"))


def _read(folder: Path) -> Case:
    model = onnx.load(folder / "model.onnx")
    protos = {"sequence_type": onnx.SequenceProto, "optional_type": onnx.OptionalProto}
    values = {}
    for i, info in enumerate(model.graph.input):
        file = folder / "test_data_set_0" / f"input_{i}.pb"
        if file.exists():
            value = protos.get(info.type.WhichOneof("value"), TensorProto)()
            value.ParseFromString(file.read_bytes())
            values[info.name] = value
    return Case(f"{folder.parent.name}/{folder.name}", model, values)


def sample(count: int, seed: int) -> list[Case]:
    """About as many cases of each group, by chance but always the same."""
    groups: dict[str, list[Case]] = {}
    for case in cases():
        groups.setdefault(case.group, []).append(case)
    share = -(-count // len(groups))
    rng = random.Random(seed)
    rare = [case for name in sorted(groups) if name != "plain" for case in _some(groups[name], share, rng)]
    return rare + _some(groups["plain"], count - len(rare), rng)


def _some(of: list[Case], count: int, rng: random.Random) -> list[Case]:
    return rng.sample(of, min(count, len(of)))


# --- what is done with both ----------------------------------------------------------------------------------


def meta(case: Case, session: Any, seed: int) -> Any:
    """What the model says of itself."""
    nodes = (session.get_inputs(), session.get_outputs(), session.get_overridable_initializers())
    described = session.get_modelmeta()
    return [[str(n) for part in nodes for n in part], [getattr(described, f) for f in META], session.get_providers()]


def run(case: Case, session: Any, seed: int) -> Any:
    """Fed with arrays, lists and None."""
    return session.run(None, case.feed)


def fed(case: Case, session: Any, seed: int) -> Any:
    """``run``, fed with OrtValues."""
    return session.run(None, dict(case.ort_feed))


def ort(case: Case, session: Any, seed: int) -> Any:
    """OrtValues in, OrtValues out."""
    return session.run_with_ort_values(None, dict(case.ort_feed))


def binding(case: Case, session: Any, seed: int) -> Any:
    """Everything bound, outputs to wherever onnxruntime likes."""
    bound = session.io_binding()
    for name, value in case.feed.items():
        if is_plain(value):
            bound.bind_cpu_input(name, value.copy(order="C"))
        else:
            bound.bind_ortvalue_input(name, case.ort_feed[name])
    for info in session.get_outputs():
        bound.bind_output(info.name)
    session.run_with_iobinding(bound)
    exact = not is_random(case)
    return [attempt(bound.get_outputs, exact), attempt(bound.copy_outputs_to_cpu, exact)]


def wrong(case: Case, session: Any, seed: int) -> Any:
    """One mistake, by chance but always the same."""
    rng = random.Random(f"{seed}:{case.name}")
    outputs, feed = rng.choice(MISTAKES)(case.feed, rng)
    return session.run(outputs, feed)


def _one(change: Callable[[np.ndarray], Any]) -> Callable[[dict[str, Any], random.Random], tuple[Any, Any]]:
    def mistake(feed: dict[str, Any], rng: random.Random) -> tuple[Any, Any]:
        names = [name for name, value in feed.items() if is_plain(value)]
        if not names:
            return None, {**feed, "of no input": np.ones(1, np.float32)}
        name = rng.choice(names)
        return None, {**feed, name: change(feed[name])}

    return mistake


def _missing(feed: dict[str, Any], rng: random.Random) -> tuple[Any, Any]:
    left_out = rng.choice([*feed, None])
    return None, {name: value for name, value in feed.items() if name != left_out}


MISTAKES = (
    _missing,
    lambda feed, rng: (None, {**feed, "of no input": np.ones(1, np.float32)}),
    lambda feed, rng: (["of no output"], feed),
    lambda feed, rng: (None, None),
    _one(lambda array: array.astype(np.int16 if array.dtype != np.int16 else np.float64)),
    _one(lambda array: array[None, None]),
    _one(lambda array: (array,)),
)
MODES = {act.__name__: act for act in (meta, run, fed, ort, binding, wrong)}


# --- the comparison ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Difference:
    """What came of one call that should have come out alike."""

    case: str
    mode: str
    expected: Any
    found: Any

    def __str__(self) -> str:
        return f"{self.case} [{self.mode}]\n    onnxruntime: {_short(self.expected)}\n    other: {_short(self.found)}"


def _short(of: Any) -> str:
    text = repr(of)
    return text if len(text) < 400 else f"{text[:300]} ... {text[-80:]}"


@dataclasses.dataclass
class Findings:
    """All that was found out about one case."""

    case: str
    differences: list[Difference] = dataclasses.field(default_factory=list)
    compared: list[str] = dataclasses.field(default_factory=list)
    refused: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    """The modes in which onnxruntime itself raised, and what: these were compared, too."""
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    random: bool = False


@functools.cache
def is_random(case: Case) -> bool:
    """Whether onnxruntime itself does not repeat its results, so that only dtypes and shapes can be compared."""
    nodes = [*case.model.graph.node, *(n for f in case.model.functions for n in f.node)]
    if RANDOM & {n.op_type for n in nodes}:
        return True
    session = real(case.blob)
    return len({repr(attempt(lambda: run(case, session, 0))) for _ in range(3)}) > 1


def real(blob: bytes) -> onnxruntime.InferenceSession:
    """The session that is right."""
    return onnxruntime.InferenceSession(blob, providers=CPU)


def compare(case: Case, make_session: MakeSession, modes: Sequence[str] = (*MODES,), seed: int = 0) -> list[Difference]:
    """What differs between onnxruntime in this process and the session that ``make_session`` makes."""
    return examine(case, make_session, modes, seed).differences


def examine(
    case: Case,
    make_session: MakeSession,
    modes: Sequence[str],
    seed: int,
    tell: Callable[[str, bool], None] = lambda mode, ours: None,
) -> Findings:
    """:func:`compare`, and what else there was to learn; ``tell`` hears who is going to do what."""
    findings = Findings(case.name)
    sessions: list[Any] = []

    def both(mode: str, acts: Sequence[Callable[[], Any]], exact: bool) -> bool:
        tell(mode, False)
        expected = attempt(acts[0], exact)
        tell(mode, True)
        found = attempt(acts[1], exact)
        findings.compared.append(mode)
        if expected[0] == "error":
            findings.refused[mode] = expected
        if expected != found:
            findings.differences.append(Difference(case.name, mode, expected, found))
        return expected[0] == found[0] == "result"

    def load(make: MakeSession) -> None:
        sessions.append(make(case.blob))
        sessions[-1].get_inputs()  # a proxy looks into the model no sooner

    try:
        if both("load", [functools.partial(load, make) for make in (real, make_session)], True):
            tell("run", False)
            findings.random = is_random(case)
            for mode in modes:
                if reason := _unfit(case, mode):
                    findings.skipped[mode] = reason
                    continue
                acts = [functools.partial(MODES[mode], case, session, seed) for session in sessions]
                both(mode, acts, not findings.random)
    finally:
        for session in sessions:
            getattr(session, "close", lambda: None)()
    return findings


def _unfit(case: Case, mode: str) -> str | None:
    """Why the values of this case cannot be made into OrtValues, where the mode needs them."""
    if mode in ("fed", "ort", "binding"):
        try:
            case.ort_feed  # noqa: B018
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:150]
    return None
