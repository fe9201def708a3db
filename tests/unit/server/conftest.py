"""Without the extra ``serve``, only that is tested which does without its packages."""

from __future__ import annotations

from onnx_dl.cli.serve import NEEDED, is_installed

collect_ignore_glob = (
    [] if all(map(is_installed, NEEDED)) else ["http/*", "grpc/*", "processes/test_*control.py"]
)
