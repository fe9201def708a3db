"""Without the extra ``serve`` there is nothing to test here."""

from __future__ import annotations

from onnx_dl.cli.serve import NEEDED, is_installed

collect_ignore_glob = [] if all(map(is_installed, NEEDED)) else ["test_*.py"]
