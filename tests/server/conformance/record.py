"""Records tritonserver's answers: ``python -m tests.server.conformance.record PYTHON``.

PYTHON is an interpreter with ``nvidia-pytriton`` and ``onnxruntime``.  The answers become
``tests/server/data/triton.json``: by step, by client.  Record again when a step or a model was changed, and
read the difference.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Final

from benchmarks.serving.servers import Triton

from tests.server.conformance import models
from tests.server.conformance.run import outcomes

RECORDED: Final = Path(__file__).parents[1] / "data" / "triton.json"


class _Triton(Triton):
    def _write_repository(self, served: object) -> None:
        models.write(self.repository, for_triton=True)


def record(python: str) -> str:
    """JSON, without names of folders and lines of Python."""
    with tempfile.TemporaryDirectory() as folder:
        server = _Triton(Path(folder) / "triton", [], loaded=models.LOADED, python=python)
        try:
            server.start()
            found = outcomes(server.http, server.grpc)
        finally:
            server.stop()
    # A line each, so that a difference can be read.
    lines = [
        f'"{step}": {{\n'
        + ",\n".join(f' "{key}": {json.dumps(told)}' for key, told in by_key.items())
        + "\n}"
        for step, by_key in found.items()
    ]
    text = ("{\n" + ",\n".join(lines) + "\n}").replace(folder, "FOLDER")
    return re.sub(r"\\n\\nAt:[^\"]*", "", text)


if __name__ == "__main__":
    RECORDED.parent.mkdir(exist_ok=True)
    RECORDED.write_text(record(sys.argv[1]) + "\n")
