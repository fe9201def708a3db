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
import onnxruntime
import sklearn
from frames import Digits, Frame, load_split, make_frames
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier, MLPRegressor

Floats = NDArray[np.float32]

SEED = 15
TRAIN_FRAMES, HELD_OUT_FRAMES = 500, 200
HELD_OUT_SEED = 2_000_000
WINDOW = 20
"""Side of the network's window, in pixels of the halved frame."""
STEP = 2
"""Distance of two windows, in pixels of the halved frame."""
UNIT = 32.0
"""Pixels of the frame that a box's numbers count in."""
HIDDEN = 24
"""Filters of each of the two networks."""
SCORE, OVERLAP, MOST = 0.85, 0.2, 100
"""Least score of a detection; overlap (IoU) from which two are one; most detections of a frame."""
OPSET, IR_VERSION = 17, 8


class Windows(NamedTuple):
    """Windows of frames, and what the network has to say of them."""

    pixels: Floats
    """[windows, WINDOW * WINDOW]"""
    is_digit: NDArray[np.bool_]
    """[windows]"""
    boxes: Floats
    """[windows, 4]: the distance of the box's sides from the window's centre, in UNIT."""


class Networks(NamedTuple):
    """The two trained networks."""

    score: MLPClassifier
    box: MLPRegressor


# --- the part that training and model share ---------------------------------------------------------------


def grey_nodes() -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """Frames to ``detail``: grey, halved, without the brightness of the surroundings."""
    grey = np.array([0.299, 0.587, 0.114], np.float32).reshape(1, 3, 1, 1)
    nodes = [
        helper.make_node("Conv", ["frames", "grey_weights"], ["grey"]),
        helper.make_node("AveragePool", ["grey"], ["halved"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("AveragePool", ["halved"], ["around"], kernel_shape=[21, 21], pads=[10] * 4),
        helper.make_node("Sub", ["halved", "around"], ["detail"]),
    ]
    return nodes, [numpy_helper.from_array(grey, "grey_weights")]


def frames_input() -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info("frames", TensorProto.FLOAT, ["N", 3, "H", "W"])


def finished(graph: onnx.GraphProto) -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="onnx_dl")
    onnx.checker.check_model(model, full_check=True)
    return model


def session_of(model: onnx.ModelProto) -> Any:
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def as_input(frames: Sequence[Frame]) -> Floats:
    """Frames as the model takes them: [frames, 3, height, width], from 0 to 1."""
    pixels = np.stack([frame.pixels for frame in frames]).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(pixels, np.float32) / np.float32(255)


# --- training ---------------------------------------------------------------------------------------------


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


# --- the models --------------------------------------------------------------------------------------------


def detector(networks: Networks) -> onnx.ModelProto:
    """The fully convolutional model: frames to boxes, scores and frame numbers of what is found."""
    weights: dict[str, NDArray[Any]] = {
        "one": np.array([1], np.int64),
        "unit": np.array(UNIT, np.float32),
        "pixels_per_step": np.array(2 * STEP, np.float32),
        "flat": np.array([0, 0, -1], np.int64),
        "most": np.array([MOST], np.int64),
        "overlap": np.array([OVERLAP], np.float32),
        "least_score": np.array([SCORE], np.float32),
        "zero": np.array(0, np.int64),
        "one_step": np.array(1, np.int64),
        "corners": np.array([1, 2, 1, 1], np.int64),
        "frame_and_place": np.array([0, 2], np.int64),
    }
    nodes, stored = grey_nodes()
    for name, network in (("score", networks.score), ("box", networks.box)):
        (first, second), (bias, last_bias) = network.coefs_, network.intercepts_
        weights[f"{name}_w1"] = first.T.reshape(HIDDEN, 1, WINDOW, WINDOW).astype(np.float32)
        weights[f"{name}_b1"] = bias.astype(np.float32)
        weights[f"{name}_w2"] = second.T.reshape(-1, HIDDEN, 1, 1).astype(np.float32)
        weights[f"{name}_b2"] = last_bias.astype(np.float32)
        before, after = WINDOW // 2, WINDOW // 2 - 1
        nodes += [
            helper.make_node(
                "Conv", ["detail", f"{name}_w1", f"{name}_b1"], [f"{name}_seen"],
                strides=[STEP, STEP], pads=[before, before, after, after],
            ),
            helper.make_node("Relu", [f"{name}_seen"], [f"{name}_hidden"]),
            helper.make_node("Conv", [f"{name}_hidden", f"{name}_w2", f"{name}_b2"], [f"{name}_map"]),
        ]  # fmt: skip
    nodes += decoding_nodes()
    stored += [numpy_helper.from_array(array, name) for name, array in weights.items()]
    outputs = [
        helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["K", 4]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["K"]),
        helper.make_tensor_value_info("frame", TensorProto.INT64, ["K"]),
    ]
    return finished(helper.make_graph(nodes, "detector", [frames_input()], outputs, stored))


def decoding_nodes() -> list[onnx.NodeProto]:
    """Maps of scores and boxes to detections: add each window's centre, drop duplicates, gather the rest."""
    node = helper.make_node
    return [
        # Scores: [N, 1, windows].
        node("Sigmoid", ["score_map"], ["score_grid"]),
        node("Reshape", ["score_grid", "flat"], ["all_scores"]),
        # Centres of the windows: x and y of each, [1, 2, rows, columns], and for both corners [1, 4, ...].
        node("Shape", ["score_map"], ["map_shape"]),
        node("Split", ["map_shape"], ["batch", "one_map", "rows", "columns"]),
        node("Squeeze", ["rows"], ["row_count"]),
        node("Squeeze", ["columns"], ["column_count"]),
        node("Range", ["zero", "row_count", "one_step"], ["row_numbers"]),
        node("Range", ["zero", "column_count", "one_step"], ["column_numbers"]),
        node("Concat", ["one", "one", "rows", "columns"], ["grid_shape"], axis=0),
        node("Unsqueeze", ["row_numbers", "one"], ["row_numbers_down"]),
        node("Expand", ["row_numbers_down", "grid_shape"], ["y_steps"]),
        node("Expand", ["column_numbers", "grid_shape"], ["x_steps"]),
        node("Concat", ["x_steps", "y_steps"], ["steps"], axis=1),
        node("Cast", ["steps"], ["steps_float"], to=TensorProto.FLOAT),
        node("Mul", ["steps_float", "pixels_per_step"], ["centres"]),
        node("Tile", ["centres", "corners"], ["centres_of_corners"]),
        # Boxes: [N, windows, 4], in pixels of the frame.
        node("Mul", ["box_map", "unit"], ["box_pixels"]),
        node("Add", ["box_pixels", "centres_of_corners"], ["box_grid"]),
        node("Reshape", ["box_grid", "flat"], ["box_rows"]),
        node("Transpose", ["box_rows"], ["all_boxes"], perm=[0, 2, 1]),
        # Detections: [K, 3], each with its frame, its class (there is one) and its window.
        node(
            "NonMaxSuppression", ["all_boxes", "all_scores", "most", "overlap", "least_score"], ["selected"]
        ),
        node("Gather", ["selected", "frame_and_place"], ["places"], axis=1),
        node("GatherND", ["all_boxes", "places"], ["boxes"]),
        node("GatherND", ["all_scores", "selected"], ["scores"]),
        node("Gather", ["selected", "zero"], ["frame"], axis=1),
    ]


def reader(network: MLPClassifier) -> onnx.ModelProto:
    """The reader: crops [N, side * side] to labels [N] and probabilities [N, 10]."""
    node = helper.make_node
    nodes = [
        node("Gemm", ["crops", "w1", "b1"], ["seen"]),
        node("Relu", ["seen"], ["hidden"]),
        node("Gemm", ["hidden", "w2", "b2"], ["logits"]),
        node("Softmax", ["logits"], ["probabilities"], axis=1),
        node("ArgMax", ["logits"], ["labels"], axis=1, keepdims=0),
    ]
    (first, second), (bias, last_bias) = network.coefs_, network.intercepts_
    weights = {"w1": first, "b1": bias, "w2": second, "b2": last_bias}
    stored = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
    inputs = [helper.make_tensor_value_info("crops", TensorProto.FLOAT, ["N", len(first)])]
    outputs = [
        helper.make_tensor_value_info("labels", TensorProto.INT64, ["N"]),
        helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", len(network.classes_)]),
    ]
    return finished(helper.make_graph(nodes, "reader", inputs, outputs, stored))


def quality() -> onnx.ModelProto:
    """A second model: brightness, contrast and sharpness (variance of the Laplacian) of each frame."""
    laplacian = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]], np.float32).reshape(1, 1, 3, 3)
    grey = np.array([0.299, 0.587, 0.114], np.float32).reshape(1, 3, 1, 1)
    everything = {"axes": [1, 2, 3], "keepdims": 1}
    node = helper.make_node
    nodes = [
        node("Conv", ["frames", "grey_weights"], ["grey"]),
        node("Conv", ["grey", "laplacian"], ["edges"]),
    ]
    for source, spread in (("grey", "variance"), ("edges", "sharpness_4d")):
        nodes += [
            node("ReduceMean", [source], [f"{source}_mean"], **everything),
            node("Sub", [source, f"{source}_mean"], [f"{source}_rest"]),
            node("Mul", [f"{source}_rest", f"{source}_rest"], [f"{source}_square"]),
            node("ReduceMean", [f"{source}_square"], [spread], **everything),
        ]
    nodes += [
        node("Sqrt", ["variance"], ["contrast_4d"]),
        node("Squeeze", ["grey_mean", "but_frames"], ["brightness"]),
        node("Squeeze", ["contrast_4d", "but_frames"], ["contrast"]),
        node("Squeeze", ["sharpness_4d", "but_frames"], ["sharpness"]),
    ]
    weights = {"grey_weights": grey, "laplacian": laplacian, "but_frames": np.array([1, 2, 3], np.int64)}
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"])
        for name in ("brightness", "contrast", "sharpness")
    ]
    stored = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    return finished(helper.make_graph(nodes, "quality", [frames_input()], outputs, stored))


# --- measuring --------------------------------------------------------------------------------------------


class Measure(NamedTuple):
    """How well a detector does."""

    precision: float
    """Part of the detections that are digits (IoU with a digit of 0.5 or more, each digit counted once)."""
    recall: float
    """Part of the digits that are detected."""
    objects: int
    """Digits in all frames."""


def overlaps(boxes: Floats, others: Floats) -> Floats:
    """IoU of each pair: [boxes, others]."""
    corner = np.maximum(boxes[:, None, :2], others[None, :, :2])
    opposite = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.prod((opposite - corner).clip(0), axis=2)
    area, other_area = (np.prod(each[:, 2:] - each[:, :2], axis=1) for each in (boxes, others))
    return np.asarray(shared / (area[:, None] + other_area[None] - shared), np.float32)


def matched(found: Floats, scores: Floats, true: Floats, least: float = 0.5) -> int:
    """Number of digits that were found: the best detection takes its digit first."""
    pairs = overlaps(found, true)
    free = np.ones(len(true), bool)
    for row in np.argsort(-scores):
        candidates = np.where(free, pairs[row], 0) if len(true) else np.zeros(0)
        if len(candidates) and candidates.max() >= least:
            free[int(candidates.argmax())] = False
    return int((~free).sum())


def measure(session: Any, frames: Sequence[Frame]) -> Measure:
    """Precision and recall of a detector, run by any class with onnxruntime's ``run()``."""
    hits = found = objects = 0
    for start in range(0, len(frames), 20):
        part = frames[start : start + 20]
        boxes, scores, numbers = session.run(None, {"frames": as_input(part)})
        for number, frame in enumerate(part):
            mine = numbers == number
            hits += matched(boxes[mine], scores[mine], frame.boxes)
        found += len(boxes)
        objects += sum(len(frame.boxes) for frame in part)
    return Measure(hits / max(found, 1), hits / max(objects, 1), objects)


def reading_accuracy(detect: Any, read: Any, frames: Sequence[Frame]) -> float:
    """Part of the detected digits that are read correctly, cut out by the detector's own boxes."""
    right = seen = 0
    for frame in frames:
        pixels = as_input([frame])
        boxes, _, _ = detect.run(None, {"frames": pixels})
        pairs = overlaps(boxes, frame.boxes)
        hits = np.flatnonzero(pairs.max(axis=1, initial=0) >= 0.5)
        if len(hits):
            labels, _ = read.run(
                None, {"crops": np.stack([images.crop(pixels[0], boxes[row]) for row in hits])}
            )
            right += int((labels == frame.labels[pairs[hits].argmax(axis=1)]).sum())
            seen += len(hits)
    return right / max(seen, 1)


def held_out_frames(count: int = HELD_OUT_FRAMES) -> list[Frame]:
    """Frames of digits and backgrounds that the detector was not trained with."""
    return make_frames(load_split()[1], count, HELD_OUT_SEED)


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
