"""The table in docs/settings.md: ``python .ci/settings_table.py`` writes it, ``--check`` compares it.

The text comes from the docstrings of ``onnx_dl.core.settings.Settings``.
"""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path

from onnx_dl import ModelHost
from onnx_dl.core import settings
from onnx_dl.core.settings import Settings
from onnx_dl.supervisor.hostfile.schema import HostTable

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
COMMAND = "python .ci/settings_table.py"
BEGIN, END = f"<!-- made by {COMMAND} -->\n", "<!-- end of the table -->\n"


def texts() -> dict[str, str]:
    """The docstrings of the fields, each in one line."""
    (body,) = ast.parse(inspect.getsource(Settings)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant), field.target.id
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def values(field: str) -> str:
    if field in settings.CHOICES:
        return " or ".join(f"`{choice}`" for choice in settings.CHOICES[field])
    if field in settings.SIZES:
        return "bytes, or text such as `2GiB`"
    if field in settings.SIZES_BY_DEVICE:
        return "bytes, text such as `2GiB`, or `0=6GiB,1=10GiB`"
    default = getattr(Settings(), field)
    return "seconds" if isinstance(default, float) else "text"


def default(field: str) -> str:
    value = getattr(Settings(), field)
    if field in settings.SIZES and value:
        value = f"{value >> 30}GiB"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def elsewhere(field: str) -> str:
    """A sentence on other places where the same is set."""
    places = []
    if field in inspect.signature(ModelHost).parameters:
        places.append(f"`ModelHost({field}=)`")
    if field in HostTable.__struct_fields__:
        places.append(f"`{field}` in `host.toml`")
    return f" Also {', '.join(places)}." if places else ""


def split(text: str) -> tuple[str, str]:
    """The meaning, and what the text says of the default."""
    meaning, _, given = text.replace("``", "`").partition(" Default: ")
    return meaning, given.removesuffix(".")


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |\n"


def table() -> str:
    lines = row("variable", "value", "default", "meaning") + row(*["---"] * 4)
    found = texts()
    for field in Settings.__struct_fields__:
        meaning, given = split(found[field])
        name = f"`ONNX_DL_{field.upper()}`"
        lines += row(name, values(field), given or default(field), meaning + elsewhere(field))
    for name, text in settings.ELSEWHERE.items():
        meaning, given = split(" ".join(text.split()))
        lines += row(f"`{name}`", "text", given, meaning)
    internal = "".join(f"- `{name}`: {split(text)[0]}\n" for name, text in settings.INTERNAL.items())
    return f"\n{lines}\nonnx-dl sets these for its own processes. Do not set them:\n\n{internal}\n"


def page(text: str) -> str:
    """The page with its table made anew."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{PAGE} should have the lines {BEGIN.strip()} and {END.strip()}.")
    return before + begin + table() + end + after


if __name__ == "__main__":
    text = PAGE.read_text()
    if sys.argv[1:] == ["--check"]:
        sys.exit(0 if page(text) == text else f"{PAGE} is not what the code says. Run: {COMMAND}")
    PAGE.write_text(page(text))
