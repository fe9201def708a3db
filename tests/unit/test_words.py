"""Docstrings say what a thing is or does: they begin with a noun or a verb, not with a clause."""

from __future__ import annotations

import ast

import pytest

from tests.unit.test_layers import MODULES, TREES

CLAUSES = set(
    "What Who Whoever Whose Whether Where When Why How By Of In At For If As Since Such To Nobody Somebody "
    "They Those This These It".split()
)


def texts(name: str) -> list[str]:
    """Docstrings, and the texts below constants and fields."""
    return [
        node.value.value.strip()
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_begin_with_a_noun_or_a_verb(name: str) -> None:
    assert [text.split("\n")[0] for text in texts(name) if text.split(" ")[0].strip(":,.") in CLAUSES] == []


@pytest.mark.parametrize("is_server", [False, True], ids=["core", "server"])
def test_a_name_stands_for_one_class(is_server: bool) -> None:
    """The server is a program of its own, and has the field's words: models, regions, tables."""
    found = [
        node.name.lstrip("_")
        for name, tree in TREES.items()
        if (name.split(".")[0] == "server") is is_server
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    ]
    assert {name for name in found if found.count(name) > 1} == set()
