"""``python -m onnx_dl.cli`` is ``onnx-dl``."""

import sys

from onnx_dl.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
