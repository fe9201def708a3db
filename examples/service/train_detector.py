"""Train the detector and the reader of the service, offline, and build its model of the frames' quality.

Usage: ``python train_detector.py [--output DIRECTORY]``. It needs onnx, onnxruntime, scikit-learn and Pillow,
and takes one to two minutes on two cores.

How the detector works: a small network looks at a window of the frame and says whether a digit is in its
middle, and where its box is. The network is trained on windows with scikit-learn. A layer of it that looks at
every window of a frame is a convolution, so the trained weights become a fully convolutional ONNX model that
takes frames of any size in batches. The model decodes the boxes and removes duplicates (NonMaxSuppression).
"""

# scikit-learn and onnxruntime come without types.
# mypy: disable-error-code="import-untyped"

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import images
import numpy as np
import onnx
import sklearn
from frames import Digits, Frame, as_input, load_split, make_frames
from graphs import (
    HIDDEN,
    STEP,
    UNIT,
    WINDOW,
    Networks,
    detector,
    finished,
    frames_input,
    grey_nodes,
    quality,
    reader,
    session_of,
)
from measuring import held_out_frames, measure, reading_accuracy
from numpy.typing import NDArray
from onnx import TensorProto, helper
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier, MLPRegressor

Floats = NDArray[np.float32]

SEED = 15
TRAIN_FRAMES = 500


class Windows(NamedTuple):
    """Windows of frames, and what the network has to say of them."""

    pixels: Floats
    """[windows, WINDOW * WINDOW]"""
    is_digit: NDArray[np.bool_]
    """[windows]"""
    boxes: Floats
    """[windows, 4]: the distance of the box's sides from the window's centre, in UNIT."""


def centres(rows: int, columns: int) -> tuple[Floats, Floats]:
    """Centre of each window in pixels of the frame: x of each column and y of each row."""
    step = np.float32(2 * STEP)
    return step * np.arange(columns, dtype=np.float32), step * np.arange(rows, dtype=np.float32)


def windows_of(detail: Floats) -> Floats:
    """Every window of one frame: [rows, columns, WINDOW * WINDOW], as the convolution sees them."""
    padded = np.pad(detail, WINDOW // 2)[: detail.shape[0] + WINDOW - 1, : detail.shape[1] + WINDOW - 1]
    views = np.lib.stride_tricks.sliding_window_view(padded, (WINDOW, WINDOW))[::STEP, ::STEP]
    return views.reshape(*views.shape[:2], -1)


def targets_of(frame: Frame, rows: int, columns: int) -> tuple[NDArray[np.int8], Floats]:
    """What each window shows: 1 a digit in its middle, 0 none, -1 something between; and the digit's box."""
    x, y = centres(rows, columns)
    kinds = np.zeros((rows, columns), np.int8)
    boxes = np.zeros((rows, columns, 4), np.float32)
    for left, top, right, bottom in frame.boxes:
        away = np.maximum(
            np.abs(x - (left + right) / 2)[None, :], np.abs(y - (top + bottom) / 2)[:, None]
        ) / (right - left)
        kinds[(away < 0.35) & (kinds == 0)] = -1
        inside = away < 0.17
        kinds[inside] = 1
        sides = np.stack(
            np.broadcast_arrays(left - x[None], top - y[:, None], right - x[None], bottom - y[:, None]), -1
        )
        boxes[inside] = sides[inside] / UNIT
    return kinds, boxes


def sample(
    frames: Sequence[Frame], generator: np.random.Generator, networks: Networks | None = None
) -> Windows:
    """Windows with digits, and as many without: at random, or (given networks) those taken for digits."""
    nodes, weights = grey_nodes()
    detail = helper.make_tensor_value_info("detail", TensorProto.FLOAT, ["N", 1, "h", "w"])
    grey = session_of(finished(helper.make_graph(nodes, "grey", [frames_input()], [detail], weights)))
    parts: list[Windows] = []
    for frame in frames:
        views = windows_of(grey.run(None, {"frames": as_input([frame])})[0][0, 0])
        kinds, boxes = targets_of(frame, *views.shape[:2])
        background = np.flatnonzero(kinds.ravel() == 0)
        flat = views.reshape(-1, WINDOW * WINDOW)
        if networks is not None:
            scores = networks.score.predict_proba(flat[background])[:, 1]
            background = background[np.argsort(scores)[::-1]][: int((scores > 0.2).sum())]
            chosen = background[:60]
        else:
            chosen = generator.choice(background, 80, replace=False)
        digits = np.flatnonzero(kinds.ravel() == 1) if networks is None else chosen[:0]
        taken = np.concatenate([digits, chosen])
        is_digit = np.arange(len(taken)) < len(digits)
        parts.append(Windows(flat[taken], is_digit, boxes.reshape(-1, 4)[taken]))
    return Windows(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def train(digits: Digits) -> Networks:
    """Train on random windows, then again with the windows that were wrongly taken for digits."""
    generator = np.random.default_rng(SEED)
    frames = make_frames(digits, TRAIN_FRAMES, SEED)
    windows = sample(frames, generator)
    networks = fit(windows, 6)
    hard = sample(make_frames(digits, TRAIN_FRAMES, SEED + 1), generator, networks)
    print(f"{len(windows.is_digit)} windows, {windows.is_digit.sum()} with digits")
    print(f"{len(hard.is_digit)} windows that were wrongly taken for digits")
    return fit(Windows(*(np.concatenate(pair) for pair in zip(windows, hard, strict=True))), 25)


def fit(windows: Windows, epochs: int) -> Networks:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of epochs is chosen
        options: dict[str, Any] = {
            "hidden_layer_sizes": (HIDDEN,), "max_iter": epochs, "random_state": SEED, "batch_size": 256,
            "learning_rate_init": 2e-3, "alpha": 1e-3,
        }  # fmt: skip
        score = MLPClassifier(**options).fit(windows.pixels, windows.is_digit)
        seen = windows.is_digit
        box = MLPRegressor(**options).fit(windows.pixels[seen], windows.boxes[seen])
    return Networks(score, box)


def crops_of(
    frames: Sequence[Frame], generator: np.random.Generator, copies: int
) -> tuple[Floats, NDArray[np.int64]]:
    """Digits cut out of frames, with boxes that are as inexact as the detector's, and their labels."""
    crops: list[Floats] = []
    labels: list[int] = []
    for frame in frames:
        (pixels,) = as_input([frame])
        for box, label in zip(frame.boxes, frame.labels, strict=True):
            side = box[2] - box[0]
            for _ in range(copies):
                crops.append(
                    images.crop(pixels, box + generator.normal(0, 0.05 * side, 4).astype(np.float32))
                )
                labels.append(int(label))
    return np.stack(crops), np.array(labels)


def train_reader(digits: Digits) -> MLPClassifier:
    """Train the network that says which digit a crop shows."""
    generator = np.random.default_rng(SEED)
    crops, labels = crops_of(make_frames(digits, 2 * TRAIN_FRAMES, SEED + 2), generator, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return MLPClassifier((64,), max_iter=25, random_state=SEED, batch_size=256, alpha=1e-2).fit(
            crops, labels
        )


def save(model: onnx.ModelProto, path: Path, doc: str, facts: dict[str, str]) -> None:
    model.doc_string = doc
    helper.set_model_props(model, facts)
    path.write_bytes(model.SerializeToString(deterministic=True))
    print(f"{path.name}: {path.stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the detector and build the model of quality.")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("models"))
    directory: Path = parser.parse_args().output
    directory.mkdir(parents=True, exist_ok=True)
    digits, _ = load_split()
    find, read = detector(train(digits)), reader(train_reader(digits))
    frames = held_out_frames()
    result = measure(session_of(find), frames)
    accuracy = reading_accuracy(session_of(find), session_of(read), frames)
    print(f"held out, {result.objects} digits: precision {result.precision:.3f}, recall {result.recall:.3f}")
    print(f"accuracy of the reader: {accuracy:.3f}")
    facts = {
        "data_set": "sklearn.datasets.load_digits on synthetic frames (frames.py)",
        "held_out_frames": str(len(frames)),
        "held_out_digits": str(result.objects),
        "seed": str(SEED),
        "scikit_learn": sklearn.__version__,
    }
    found = {"held_out_precision": f"{result.precision:.4f}", "held_out_recall": f"{result.recall:.4f}"}
    made = "Made by examples/service/train_detector.py of onnx_dl."
    save(find, directory / "detector.onnx", f"Finds handwritten digits in frames. {made}", facts | found)
    read_facts = facts | {"held_out_accuracy": f"{accuracy:.4f}"}
    save(read, directory / "reader.onnx", f"Reads digits that the detector found. {made}", read_facts)
    save(quality(), directory / "quality.onnx", f"Brightness, contrast, sharpness of frames. {made}", {})


if __name__ == "__main__":
    main()
