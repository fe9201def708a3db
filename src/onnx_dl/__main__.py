"""``python -m onnx_dl``: the command ``onnx-dl``."""

from __future__ import annotations

import sys

from onnx_dl.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
