"""ONNX's own backend tests, done by onnxruntime here and by a session of another kind: the same must come.

Right is what onnxruntime says in this process, bit for bit, errors included; not what the test expects.

    python -m tests.support.onnx_node --all [--jobs 2] [--only GLOB] [--modes run,ort] [--seed N] [--self]

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
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["ONNX_DL_CACHE"] = "off"

import numpy as np
import onnxruntime

from onnx_dl import InferenceSessionProxy, ModelHost
from tests.support.onnx_cases import Case, cases, sample
from tests.support.onnx_crew import Crashed, each
from tests.support.onnx_values import CPU, attempt, is_plain, outcome

MakeSession = Callable[[bytes], Any]
RANDOM = {
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}
META = (
    "custom_metadata_map",
    "description",
    "domain",
    "graph_description",
    "graph_name",
    "producer_name",
    "version",
)


# --- what is done with both --------------------------------------------------------------------------------


def meta(case: Case, session: Any, seed: int) -> Any:
    """What the model says of itself."""
    nodes = (session.get_inputs(), session.get_outputs(), session.get_overridable_initializers())
    described = session.get_modelmeta()
    return [
        [str(n) for part in nodes for n in part],
        [getattr(described, f) for f in META],
        session.get_providers(),
    ]


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
    outputs = bound.get_outputs()
    # Text ends onnxruntime natively there.
    text = any(output.has_value() and output.data_type() == "tensor(string)" for output in outputs)
    return [outputs, text or outcome(bound.copy_outputs_to_cpu)]


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


@np.errstate(all="ignore")
def _of_another_dtype(array: np.ndarray) -> np.ndarray:
    return array.astype(np.int16 if array.dtype != np.int16 else np.float64)


MISTAKES = (
    _missing,
    lambda feed, rng: (None, {**feed, "of no input": np.ones(1, np.float32)}),
    lambda feed, rng: (["of no output"], feed),
    lambda feed, rng: (None, None),
    _one(_of_another_dtype),
    _one(lambda array: array[None, None]),
    _one(lambda array: (array,)),
)
MODES = {act.__name__: act for act in (meta, run, fed, ort, binding, wrong)}


# --- the comparison ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Difference:
    """What came of one call that should have come out alike."""

    case: str
    mode: str
    expected: Any
    found: Any

    def __str__(self) -> str:
        both = f"    onnxruntime: {_short(self.expected)}\n    other: {_short(self.found)}"
        return f"{self.case} [{self.mode}]\n{both}"


def _short(of: Any) -> str:
    text = repr(of)
    return text if len(text) < 400 else f"{text[:300]} ... {text[-80:]}"


@dataclasses.dataclass
class Findings:
    """All that was found out about one case."""

    case: str
    differences: list[Difference] = dataclasses.field(default_factory=list)
    compared: list[str] = dataclasses.field(default_factory=list)
    refused: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The modes in which onnxruntime itself raised, and what: these were compared, too."""
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    random: bool = False


@functools.cache
def is_random(case: Case) -> bool:
    """Whether onnxruntime does not repeat its own results: only dtypes and shapes can be compared then."""
    nodes = [*case.model.graph.node, *(n for f in case.model.functions for n in f.node)]
    if RANDOM & {n.op_type for n in nodes}:
        return True
    session = real(case.blob)
    return len({repr(attempt(lambda: run(case, session, 0))) for _ in range(3)}) > 1


def real(blob: bytes) -> onnxruntime.InferenceSession:
    """The session that is right."""
    return onnxruntime.InferenceSession(blob, providers=CPU)


def compare(
    case: Case, make_session: MakeSession, modes: Sequence[str] = (*MODES,), seed: int = 0
) -> list[Difference]:
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
    """Why this case cannot be done in this mode: no OrtValues can be made, or onnxruntime would crash."""
    if mode in ("fed", "ort", "binding"):
        try:
            values = case.ort_feed.values()
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:150]
        if not all(value.has_value() for value in values):
            return "an empty optional OrtValue as an input crashes onnxruntime"
    return None


# --- the command -------------------------------------------------------------------------------------------


class Summary:
    """What is worth saying of all cases."""

    def __init__(self, verbose: bool) -> None:
        self.verbose = verbose
        self.findings: list[Findings] = []
        self.crashes: list[str] = []
        self.differences: list[Difference] = []

    def add(self, result: Findings | Crashed) -> None:
        """A crash in onnxruntime itself is nobody's difference; one in the other session is."""
        if isinstance(result, Findings):
            self.findings.append(result)
            self.differences += result.differences
            return
        mode, ours = result.last_words or ("start", True)
        if ours:
            self.differences.append(Difference(result.item.name, mode, "no crash", f"exit {result.exitcode}"))
        else:
            self.crashes.append(f"{result.item.name} [{mode}]: exit {result.exitcode}")

    def __str__(self) -> str:
        compared = Counter(mode for f in self.findings for mode in f.compared)
        refused = Counter(mode for f in self.findings for mode in f.refused)
        lines = [f"{len(self.findings) + len(self.crashes)} cases"]
        lines += [
            f"{m}: {n} compared, of these {refused[m]} raise in onnxruntime" for m, n in compared.items()
        ]
        lines += _listed(
            "skipped", [f"{f.case} [{m}]: {why}" for f in self.findings for m, why in f.skipped.items()]
        )
        lines += _listed("onnxruntime crashed", self.crashes)
        lines += _listed("random, so shapes and dtypes only", [f.case for f in self.findings if f.random])
        if self.verbose:
            lines += [f"{f.case} [{m}]: {_short(e)}" for f in self.findings for m, e in f.refused.items()]
        per_mode = Counter(d.mode for d in self.differences)
        lines += [str(d) for d in self.differences]
        lines += [f"{len(self.differences)} differences {dict(per_mode)}"]
        return "\n".join(lines)


def _listed(title: str, items: Sequence[str]) -> list[str]:
    return [f"{title}: {len(items)}", *(f"    {item}" for item in items)] if items else []


def _work(options: argparse.Namespace, of: Sequence[Case], say: Callable[..., None]) -> None:
    """In a process of its own: each case with a proxy of its own, all of one host."""
    onnxruntime.set_default_logger_severity(4)
    with ModelHost() as host:
        proxy = functools.partial(InferenceSessionProxy, providers=CPU, host=host)
        for case in of:
            tell = functools.partial(say, "now")
            say("done", examine(case, real if options.self else proxy, options.modes, options.seed, tell))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares, says what came of it, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="not only a sample of 60")
    parser.add_argument("--only", default="*", metavar="GLOB", help="the cases of these names")
    parser.add_argument("--modes", default=",".join(MODES), type=str, help="default: %(default)s")
    parser.add_argument("--jobs", default=2, type=int)
    parser.add_argument("--seed", default=0, type=int, help="of the sample and of the mistakes")
    parser.add_argument(
        "--self", action="store_true", help="compare onnxruntime with itself, to test this test"
    )
    parser.add_argument("--verbose", action="store_true", help="also what onnxruntime refuses")
    options = parser.parse_args(arguments)
    options.modes = options.modes.split(",")
    if unknown := set(options.modes) - set(MODES):
        parser.error(f"no such modes: {', '.join(sorted(unknown))}")
    chosen = cases() if options.all or options.only != "*" else sample(60, options.seed)
    chosen = [case for case in chosen if fnmatch.fnmatch(case.name, options.only)]
    summary = Summary(options.verbose)
    for result in each(functools.partial(_work, options), chosen, options.jobs):
        summary.add(result)
    print(summary)
    return 1 if summary.differences else 0


if __name__ == "__main__":
    sys.exit(main())
