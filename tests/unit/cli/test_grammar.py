"""Help of all commands, and the page that describes them."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
import shtab

from onnx_dl.cli import grammar
from onnx_dl.cli.help_texts import COMMANDS
from onnx_dl.cli.main import _COMMANDS

PAGE = (Path(__file__).parents[3] / "docs" / "commands.md").read_text()
WITHOUT_HOST = {"demo", "cache", "doctor", "completion"}


def commands() -> dict[str, argparse.ArgumentParser]:
    for action in grammar.parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("there are no commands")


def options(command: argparse.ArgumentParser) -> dict[str, str | None]:
    """The option strings that are shown, with their help."""
    return {
        name: action.help
        for action in command._actions
        for name in action.option_strings
        if action.help != argparse.SUPPRESS
    }


def test_the_page_has_all_commands_and_options() -> None:
    told = dict(re.findall(r"^onnx-dl (\w+) {2,}(.+)$", PAGE, flags=re.MULTILINE))
    assert told == {name: text.summary for name, text in COMMANDS.items()}
    assert commands().keys() == COMMANDS.keys() == _COMMANDS.keys()
    for name, command in commands().items():
        missing = [option for option in options(command) if not re.search(rf"(?<!\w){option}\b", PAGE)]
        assert not set(missing) - {"-h", "--help"}, name


def test_every_command_for_a_host_has_one_host_option() -> None:
    told = {name: options(command).get("--host") for name, command in commands().items()}
    assert {name for name, text in told.items() if text is None} == WITHOUT_HOST
    del told["run"], told["serve"]  # without a host, these have one of their own
    assert len({text for text in told.values() if text is not None}) == 1


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_fits_80_columns(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = (grammar.parser() if name is None else commands()[name]).format_help()
    assert max(map(len, shown.splitlines())) <= 80
    assert "examples:\n  onnx-dl " in shown or name == "completion"


def test_files_are_completed_as_shtab_does() -> None:
    assert {shell: shtab.FILE[shell] for shell in grammar.SHELLS} == grammar._FILE
