"""docs/moving-from-triton.md names what there is: options, fields, parameters, metrics."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from onnx_dl.cli import grammar
from onnx_dl.server.metrics import families
from onnx_dl.server.repository import config, schema, session_options

TEXT = (Path(__file__).parents[2] / "docs" / "moving-from-triton.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))


def rows(section: str) -> list[tuple[str, str]]:
    """The two cells of each row of a section's first table, without its head."""
    found = re.findall(r"^\| (.+?) \| (.+?) \|$", SECTIONS[section], re.MULTILINE)
    return found[1:]


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def options() -> set[str]:
    """Options of ``onnx-dl serve``."""
    (commands,) = [
        action for action in grammar.parser()._actions if isinstance(action, argparse._SubParsersAction)
    ]
    return {option for action in commands.choices["serve"]._actions for option in action.option_strings}


def test_the_options_are_there() -> None:
    named = {
        word for _, here in rows("Options") for code in codes(here) for word in re.findall(r"--[\w-]+", code)
    }
    assert named and named <= options()


def test_the_command_is_understood() -> None:
    (command,) = re.findall(r"^onnx-dl (serve .*)$", TEXT, re.MULTILINE)
    assert grammar.parser().parse_args(command.split()).model_control == "explicit"


def fields(words: str) -> set[str]:
    """Fields in the first cell of the row of the configuration whose second cell has these words."""
    (found,) = [first for first, second in rows("config.pbtxt") if second.startswith(words)]
    return {code.split(":")[0].split()[0] for code in codes(found)}


def test_the_refused_fields_are_those_that_are_refused() -> None:
    assert fields("the model is refused with file and line") == {
        *config._REFUSED, *config._OF_INPUT, "decoupled", "format"
    } - {"is_non_linear_format_io"}  # fmt: skip


def test_the_ignored_fields_are_told() -> None:
    named = fields("told once, and ignored")
    assert config._TOLD.keys() <= named


def test_the_parameters_are_all_there() -> None:
    (line,) = re.findall(r"^The names are (.*)$", TEXT, re.MULTILINE)
    assert [code.removeprefix("onnx_dl").removeprefix(".") for code in codes(line)] == [*config._PARAMETERS]
    (known,) = [codes(first) for first, _ in rows("config.pbtxt") if "intra_op_thread_count" in first]
    assert set(known) - {"parameters", "session.*"} == {
        *session_options._THREADS, *session_options._FLAGS, *session_options._OF_CUDA, "execution_mode",
    }  # fmt: skip


def test_fields_are_fields_of_the_message() -> None:
    known = {name for message in schema.MESSAGES.values() for name in message}
    for first, _ in rows("config.pbtxt"):
        named = {
            word for code in codes(first) for word in re.findall(r"[a-z]\w+", re.sub(r'".*?"', "", code))
        }
        assert named <= known | {
            *session_options._THREADS, *session_options._FLAGS, *session_options._OF_CUDA, "execution_mode",
            "session", "cuda", "tensorrt", "openvino",
        }, first  # fmt: skip


def test_the_metrics_are_there() -> None:
    served = families.render([], None, "")[0].decode()
    kept = [code for first, here in rows("Metrics") if "the same" in here for code in codes(first)]
    names = [name for name in kept if name.startswith("nv_")]
    assert len(names) > 10 and [name for name in names if f"# TYPE {name} " not in served] == []
    gone = [code for first, here in rows("Metrics") if "not there" in here for code in codes(first)]
    assert gone and not [name for name in gone if name.removesuffix("*") in served]
