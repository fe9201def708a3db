"""Make the demo's models and samples from data sets that come with scikit-learn; nothing is downloaded.

Usage: ``python examples/train_models.py [--output DIRECTORY]``, with onnx_dl, scikit-learn, skl2onnx, onnx
and onnxruntime installed. Two runs with the same versions on the same machine write the same bytes.
"""

# scikit-learn, skl2onnx and onnxruntime come without types.
# mypy: disable-error-code="import-untyped"

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import sklearn
from numpy.typing import NDArray
from onnx import TensorProto, helper
from skl2onnx import convert_sklearn
from skl2onnx.common.data_types import FloatTensorType
from sklearn.datasets import load_diabetes, load_digits, load_wine
from sklearn.ensemble import GradientBoostingRegressor, RandomForestClassifier
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from onnx_dl.demo import assets

SEED = 7
TEST_FRACTION = 0.25
SAMPLE_ROWS = 40
# Old enough for every onnxruntime of the last years.
OPSETS = {"": 17, "ai.onnx.ml": 3}
IR_VERSION = 8


class Recipe(NamedTuple):
    """How one model is trained, converted and judged."""

    name: str
    """The model's name in `assets.SMALL_MODELS`."""
    input_name: str
    """What the model's input is to be called."""
    source: str
    """The data set and its origin, in words."""
    inputs: NDArray[np.float32]
    """Every row of the data set, [rows, features]."""
    targets: NDArray[Any]
    """The answer for each row, [rows], in the type the model is to give."""
    class_names: NDArray[np.str_]
    """The classes in the order of the model's probabilities, [classes]; empty for a regression."""
    estimator: Any
    """The scikit-learn estimator, untrained."""
    options: dict[str, Any]
    """Options of the converter for the estimator."""


class HeldOut(NamedTuple):
    """The rows a model was not trained on."""

    inputs: NDArray[np.float32]
    """[rows, features]"""
    targets: NDArray[Any]
    """[rows]"""


def digits_recipe() -> Recipe:
    """Handwritten digits, 8 x 8 pixels of 0 to 16, by a network of one hidden layer; outputs are tensors."""
    data = load_digits()
    network = MLPClassifier(hidden_layer_sizes=(128,), alpha=1e-3, max_iter=300, random_state=SEED)
    return Recipe(
        name="digits",
        input_name="pixels",
        source="sklearn.datasets.load_digits (UCI Optical Recognition of Handwritten Digits, test part)",
        inputs=data.data.astype(np.float32),
        targets=data.target.astype(np.int64),
        class_names=data.target_names.astype(str),
        estimator=make_pipeline(MinMaxScaler(), network),
        options={"zipmap": False},
    )


def wine_recipe() -> Recipe:
    """Cultivars of wine from 13 chemical measurements, by a random forest; probabilities are dicts."""
    data = load_wine()
    return Recipe(
        name="wine",
        input_name="measurements",
        source="sklearn.datasets.load_wine (UCI Wine)",
        inputs=data.data.astype(np.float32),
        targets=data.target_names[data.target].astype(str),
        class_names=data.target_names.astype(str),
        estimator=RandomForestClassifier(n_estimators=50, max_depth=5, random_state=SEED),
        options={"zipmap": True},
    )


def diabetes_recipe() -> Recipe:
    """Progression of diabetes after one year from 10 measurements, by a scaler and gradient boosting."""
    data = load_diabetes(scaled=False)
    boosting = GradientBoostingRegressor(
        n_estimators=100, max_depth=2, learning_rate=0.05, subsample=0.7, random_state=SEED
    )
    return Recipe(
        name="diabetes",
        input_name="measurements",
        source="sklearn.datasets.load_diabetes, unscaled (Efron et al. 2004)",
        inputs=data.data.astype(np.float32),
        targets=data.target.astype(np.float32),
        class_names=np.array([], dtype=np.str_),
        estimator=make_pipeline(StandardScaler(), boosting),
        options={},
    )


def train(recipe: Recipe) -> tuple[onnx.ModelProto, HeldOut]:
    """Train on one part of the data; return the converted model and the other part."""
    train_inputs, test_inputs, train_targets, test_targets = train_test_split(
        recipe.inputs,
        recipe.targets,
        test_size=TEST_FRACTION,
        random_state=SEED,
        stratify=recipe.targets if recipe.class_names.size else None,
    )
    estimator = recipe.estimator.fit(train_inputs, train_targets)
    model = convert_sklearn(
        estimator,
        # Without a name the converter invents a random one.
        name=recipe.name,
        initial_types=[(recipe.input_name, FloatTensorType([None, recipe.inputs.shape[1]]))],
        options={id(estimator): recipe.options},
        target_opset=OPSETS,
    )
    sort_opsets(model)
    return model, HeldOut(test_inputs, test_targets)


def sort_opsets(model: onnx.ModelProto) -> None:
    """Put the operator sets in order, each once: the converter lists them in the order of a Python set.

    That order changes from run to run whatever PYTHONHASHSEED is, and one set may be listed twice.
    """
    listed = sorted({(opset.domain, opset.version) for opset in model.opset_import})
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in listed)


def judge(model: onnx.ModelProto, recipe: Recipe, held_out: HeldOut) -> tuple[str, float]:
    """Return the measure's name and held-out value, of the converted model as onnxruntime runs it."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    answers = session.run(None, {recipe.input_name: held_out.inputs})[0].ravel()
    if recipe.class_names.size:
        return "accuracy", float(accuracy_score(held_out.targets, answers.astype(held_out.targets.dtype)))
    return "R2", float(r2_score(held_out.targets, answers))


def describe(model: onnx.ModelProto, doc: str, facts: dict[str, str]) -> None:
    """Set the model's documentation and metadata."""
    model.doc_string = doc
    helper.set_model_props(model, facts)


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write the model, the same bytes for the same model."""
    path.write_bytes(model.SerializeToString(deterministic=True))
    print(f"{path.name}: {path.stat().st_size} bytes")


def make_small_model(recipe: Recipe, directory: Path) -> dict[str, NDArray[Any]]:
    """Train, judge and write one model; return its samples as the arrays of the samples file."""
    model, held_out = train(recipe)
    measure, value = judge(model, recipe, held_out)
    print(f"{recipe.name}: held-out {measure} {value:.4f} on {len(held_out.targets)} rows")
    describe(
        model,
        f"{recipe.source}; held-out {measure} {value:.4f}. Made by examples/train_models.py of onnx_dl.",
        {
            "data_set": recipe.source,
            "held_out_measure": measure,
            "held_out_value": f"{value:.4f}",
            "held_out_rows": str(len(held_out.targets)),
            "trained_rows": str(len(recipe.targets) - len(held_out.targets)),
            "seed": str(SEED),
            "scikit_learn": sklearn.__version__,
        },
    )
    onnx.checker.check_model(model, full_check=True)
    save(model, directory / f"{recipe.name}.onnx")
    return {
        f"{recipe.name}.input_name": np.array(recipe.input_name),
        f"{recipe.name}.inputs": held_out.inputs[:SAMPLE_ROWS],
        f"{recipe.name}.targets": held_out.targets[:SAMPLE_ROWS],
        f"{recipe.name}.class_names": recipe.class_names,
    }


def large_weight(layer: int) -> TensorProto:
    """Return the initializer of one layer of the large model: a place in the data file, without the data."""
    weight = TensorProto(
        name=f"W{layer}",
        data_type=TensorProto.FLOAT,
        dims=[assets.LARGE_WIDTH, assets.LARGE_WIDTH],
        data_location=TensorProto.EXTERNAL,
    )
    place = {
        "location": assets.LARGE_DATA_FILE,
        "offset": str(layer * assets.LARGE_WEIGHT_BYTES),
        "length": str(assets.LARGE_WEIGHT_BYTES),
    }
    for key, value in place.items():
        weight.external_data.add(key=key, value=value)
    return weight


def make_large_model_file(directory: Path) -> None:
    """Write the large model without its weights: `assets.make_large_model` makes those where needed."""
    layers = range(assets.LARGE_LAYERS)
    # X -> MatMul -> M0 -> Tanh -> H1 -> MatMul -> M1 -> Tanh -> ... -> Y
    signals = ["X", *(f"H{layer}" for layer in layers[1:]), "Y"]
    nodes = []
    for layer in layers:
        nodes.append(helper.make_node("MatMul", [signals[layer], f"W{layer}"], [f"M{layer}"]))
        nodes.append(helper.make_node("Tanh", [f"M{layer}"], [signals[layer + 1]]))
    shape: list[str | int | None] = ["N", assets.LARGE_WIDTH]
    graph = helper.make_graph(
        nodes,
        assets.LARGE_MODEL,
        inputs=[helper.make_tensor_value_info("X", TensorProto.FLOAT, shape)],
        outputs=[helper.make_tensor_value_info("Y", TensorProto.FLOAT, shape)],
        initializer=[large_weight(layer) for layer in layers],
    )
    opsets = [helper.make_opsetid("", OPSETS[""])]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="onnx_dl")
    describe(
        model,
        "Random weights, untrained: a model that is large. Weights by onnx_dl.demo.assets.make_large_model.",
        {"data_set": "none", "seed": str(assets.LARGE_SEED), "weight_bytes": str(assets.LARGE_DATA_BYTES)},
    )
    save(model, directory / f"{assets.LARGE_MODEL}.onnx")


def main() -> None:
    """Make every file."""
    parser = argparse.ArgumentParser(description="Make the demo's models and samples.")
    default = Path(__file__).parents[1] / "src" / "onnx_dl" / "demo" / "assets"
    parser.add_argument("--output", type=Path, default=default, help="directory to write to")
    directory: Path = parser.parse_args().output
    directory.mkdir(parents=True, exist_ok=True)

    samples: dict[str, NDArray[Any]] = {}
    for recipe in (digits_recipe(), wine_recipe(), diabetes_recipe()):
        samples |= make_small_model(recipe, directory)
    np.savez_compressed(directory / assets.SAMPLES_FILE, allow_pickle=False, **samples)
    make_large_model_file(directory)


if __name__ == "__main__":
    main()
