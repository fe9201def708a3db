"""The ONNX graphs of the service's models. ``train_detector.py`` trains the weights that go into them."""

# scikit-learn and onnxruntime come without types.
# mypy: disable-error-code="import-untyped"

from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from sklearn.neural_network import MLPClassifier, MLPRegressor

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


class Networks(NamedTuple):
    """The two trained networks."""

    score: MLPClassifier
    box: MLPRegressor


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
