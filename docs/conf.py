"""Sphinx builds the site with this: ``.ci/docs``, or ``sphinx-build -W -n docs docs/_build/html``.

The pages are Markdown that GitHub shows, too.  Nothing is fetched from the network.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from docutils.nodes import Element
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import onnx_dl

DOCS = Path(__file__).parent
ROOT = DOCS.parent

project = "onnx-dl"
author = "the onnx-dl authors"
project_copyright = author
version = release = onnx_dl.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinxcontrib.mermaid",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"onnx-dl {version}"
html_show_sourcelink = False

myst_heading_anchors = 4  # the names that GitHub gives to headings
myst_fence_as_directive = ["mermaid"]
copybutton_prompt_text = "$ "

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_attr_annotations = True
autodoc_type_aliases = {
    "Array": "numpy.ndarray",
    "DTypeLike": "numpy.typing.DTypeLike",
    "NDArray": "numpy.ndarray",
}
autodoc_preserve_defaults = True

nitpicky = True
nitpick_ignore_regex = [
    # Other projects' names are not looked up, because that needs the network.
    (r"py:.*", r"(collections|typing|os|enum|threading|contextlib|msgspec|numpy|onnxruntime)\..*"),
    (r"py:.*", r"[A-Z]\w*(Error|Warning|Exception|Group)|Exception"),  # Python's own errors
    (r"py:.*", r"np\.\w+|NDArray|DTypeLike|optional|NoSuchFile"),
]
suppress_warnings = ["ref.python"]  # the built-in "type" and attributes of that name

# --- links and pages from outside of this folder ----------------------------------------------------------

SHOWN = {
    "index": "README.md",
    "project/changelog": "CHANGELOG.md",
    "project/contributing": "CONTRIBUTING.md",
    "project/examples": "examples/README.md",
    "project/service": "examples/service/README.md",
    "project/serving": "examples/serving/README.md",
}
"""Pages that show a file from outside of this folder, where the page has the line PLACE."""
PLACE = re.compile(r"^<!-- The site shows .* here\. -->$", re.MULTILINE)
PAGE_OF = {ROOT / path: DOCS / f"{page}.md" for page, path in SHOWN.items()}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def moved(text: str, home: Path, page: Path) -> str:
    """The text with its relative links changed, from a file in the folder ``home`` to the file ``page``."""

    def place(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(home / link[1]))
        if target.is_dir() and (target / "README.md").exists():
            target /= "README.md"
        return os.path.relpath(PAGE_OF.get(target, target), page.parent)

    parts = CODE.split(text)
    return "".join(part if part.startswith("```") else LINK.sub(place, part) for part in parts)


def read(app: Sphinx, page: str, source: list[str]) -> None:
    """Puts the file that a page shows into it, and makes links to files outside of this folder work."""
    path = DOCS / f"{page}.md"
    source[0] = moved(source[0], path.parent, path)
    if shown := SHOWN.get(page):
        file = ROOT / shown
        app.env.note_dependency(str(file))
        text = moved(file.read_text(), file.parent, path)
        source[0], count = PLACE.subn(lambda _: text, source[0])
        assert count == 1, f"{path} should have the line that {PLACE.pattern} finds once"


# --- names of the API -------------------------------------------------------------------------------------


FACES = {"HostClient": "ModelHost", "ModelProxy": "InferenceSessionProxy"}
"""Bases that annotations name, and the classes that users know."""


def public_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: Element) -> Element | None:
    """Links a name in the module where it is defined to where users import it from: ``onnx_dl.NAME``."""
    parts = [FACES.get(part, part) for part in node.get("reftarget", "").split(".")]
    first = next((index for index, part in enumerate(parts) if part in onnx_dl.__all__), None)
    if node.get("refdomain") != "py" or first is None:
        return None
    target = ".".join(["onnx_dl", *parts[first:]])
    if target == node["reftarget"]:
        return None
    domain: Any = env.domains.python_domain
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, content)


def first_line_is_text(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Napoleon takes what is before a colon in the first line of an attribute for its type; ours is text."""
    if what in ("attribute", "property", "data"):
        lines[:0] = ["..", ""]  # an empty comment


def readable(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """Writes an alias as its name also inside of another type, and "..." for a default that has no text."""

    def plain(text: str | None) -> str | None:
        return text and re.sub(r"TypeAliasForwardRef\('(.*?)'\)", r"\1", text).replace("_MISSING", "...")

    return plain(signature), plain(returned)


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", first_line_is_text, priority=400)  # napoleon's is 500
    app.connect("source-read", read)
    app.connect("autodoc-process-signature", readable)
    app.connect("missing-reference", public_name)
