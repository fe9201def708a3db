"""The command ``onnx-dl``.

Covers arguments and exit codes; what a command does is in the module that it names.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence

from onnx_dl.errors import OnnxDLError


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(
        prog="onnx-dl",
        description="onnxruntime sessions that live in worker processes and give all their memory back.",
    )
    top.add_argument(
        "--version", action="version", version=f"onnx-dl {importlib.metadata.version('onnx-dl')}"
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("demo", help="load, use and unload four models, beside the same work in-process")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    parser().parse_args(argv)
    from onnx_dl.demo.show import demo

    try:
        demo()
    except OnnxDLError as error:
        print(f"onnx-dl: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
