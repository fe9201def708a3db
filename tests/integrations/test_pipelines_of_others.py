"""Models that scikit-learn makes, as skl2onnx writes them: maps and text, through the proxy as without it."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np
import onnxruntime
import pytest

from onnx_dl import InferenceSessionProxy, ModelHost
from tests.support.onnx_values import CPU, attempt

pytestmark = pytest.mark.slow

ROWS = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
TEXTS = [
    "the cat sat",
    "on the mat",
    "",
    "the DOG and the cat",
    "naïve café",
    "a mat, a dog; a cat",
    "the " * 200,
]


def converted(model: Any, kind: Any, options: dict[str, Any] | None = None) -> bytes:
    from skl2onnx import to_onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages about each other's versions
        made = to_onnx(
            model, initial_types=[("X", kind)], options=options and {id(model): options}, target_opset=17
        )
    blob: bytes = made.SerializeToString()
    return blob


@functools.cache
def forest(labels: str) -> bytes:
    """A classifier whose second result is a list of dicts: a probability per label."""
    from skl2onnx.common.data_types import FloatTensorType
    from sklearn.ensemble import RandomForestClassifier

    truth = (ROWS[:, 0] > 0).astype(int) + (ROWS[:, 1] > 1)
    named = np.array(["none", "éin", "two"])[truth] if labels == "text" else truth
    model = RandomForestClassifier(8, max_depth=3, random_state=0).fit(ROWS, named)
    return converted(model, FloatTensorType([None, 3]), {"zipmap": True})


@functools.cache
def vectorizer(kind: str) -> bytes:
    """Text in, numbers out; not in lower case, for which onnxruntime would need an American system."""
    from skl2onnx.common.data_types import StringTensorType
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

    model = {"tfidf": TfidfVectorizer, "count": CountVectorizer}[kind](
        ngram_range=(1, 2), lowercase=False
    ).fit(TEXTS)
    return converted(model, StringTensorType([None]))


def both(blob: bytes, host: ModelHost, feeds: dict[str, Any], outputs: Any = None) -> list[Any]:
    """For each feed, that the same comes from the proxy as from onnxruntime; and which: result or error."""
    real = onnxruntime.InferenceSession(blob, providers=CPU)
    proxy = InferenceSessionProxy(blob, providers=CPU, host=host)
    came = []
    for name, feed in feeds.items():
        expected = attempt(lambda feed=feed: real.run(outputs, feed))
        assert attempt(lambda feed=feed: proxy.run(outputs, feed)) == expected, name
        came.append(expected[0])
    return came


@pytest.mark.parametrize("labels", ["numbers", "text"])
def test_a_random_forest_with_probabilities_by_label(labels: str, host: ModelHost) -> None:
    feeds = {
        "all": {"X": ROWS},
        "one": {"X": ROWS[:1]},
        "none": {"X": ROWS[:0]},
        "strided": {"X": ROWS[::-2]},
        "Fortran": {"X": np.asfortranarray(ROWS)},
        "list": {"X": ROWS[:2].tolist()},
        "double": {"X": ROWS.astype(np.float64)},
        "a row": {"X": ROWS[0]},
        "columns": {"X": ROWS[:, :2]},
    }
    came = both(forest(labels), host, feeds)
    assert came == ["result"] * 6 + ["error"] * 3
    assert both(forest(labels), host, {"all": {"X": ROWS}}, ["output_probability"]) == ["result"]
    proxy = InferenceSessionProxy(forest(labels), providers=CPU, host=host)
    (probabilities,) = proxy.run(["output_probability"], {"X": ROWS[:2]})
    assert {type(key) for key in probabilities[0]} == {str if labels == "text" else int}
    assert sum(probabilities[1].values()) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["tfidf", "count"])
def test_a_vectorizer_of_text(kind: str, host: ModelHost) -> None:
    feeds = {
        "object array": {"X": np.array(TEXTS, object)},
        "<U array": {"X": np.array(TEXTS)},
        # With room for a NUL: without, onnxruntime reads on, into the next text or beyond the array.
        "bytes": {"X": np.array([text.encode() for text in TEXTS], "S1000")},
        "one": {"X": np.array(TEXTS[:1])},
        "strided": {"X": np.array(TEXTS)[::-2]},
        "none": {"X": np.array([], object)},
        "list": {"X": TEXTS},
        "list of one": {"X": TEXTS[:1]},
        "list of lists": {"X": [TEXTS]},
        "text": {"X": TEXTS[0]},
        "tuple": {"X": tuple(TEXTS)},
        "numbers": {"X": np.ones(2, np.float32)},
    }
    came = both(vectorizer(kind), host, feeds)
    assert came[:3] == ["result"] * 3
    assert came[-3:] == ["error"] * 3


def test_forms_of_the_constructor_that_others_use(host: ModelHost) -> None:
    blob = forest("numbers")
    expected = attempt(lambda: onnxruntime.InferenceSession(blob, providers=CPU).run(None, {"X": ROWS}))
    for session in (
        InferenceSessionProxy(blob, None, tuple(CPU), host=host),
        InferenceSessionProxy(blob, providers=tuple(CPU), provider_options=[{}], host=host),
        InferenceSessionProxy(path_or_bytes=blob, providers=CPU, provider_options=[{}], host=host),
        InferenceSessionProxy(path_or_bytes=blob, sess_options=onnxruntime.SessionOptions(), host=host),
        InferenceSessionProxy(blob, providers=[("CPUExecutionProvider", {})], host=host),
        InferenceSessionProxy(blob, None, ["CPUExecutionProvider"], [{}], host=host),
    ):
        names = [node.name for node in session.get_outputs()]
        for outputs in (None, names):
            act = functools.partial(session.run, outputs, {session.get_inputs()[0].name: ROWS})
            assert attempt(act) == expected
