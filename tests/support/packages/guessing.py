"""magika: what a file is."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import magika
from shown import show

TEXTS = [
    b"import os\n\n\ndef main():\n    print(os.getcwd())\n\n\nif __name__ == '__main__':\n    main()\n" * 3,
    b"<!doctype html><html><head><title>x</title></head><body><p>text</p></body></html>\n" * 4,
    b'{"a": [1, 2, 3], "b": {"c": null, "d": true}, "e": "text"}\n' * 4,
    b"#include <stdio.h>\nint main(void) { printf(\"%d\\n\", 1); return 0; }\n" * 5,
    b"SELECT name, count(*) FROM people WHERE age > 30 GROUP BY name;\n" * 5,
    b"PK\x03\x04" + bytes(range(256)) * 8,
    b"",
    b"a",
]  # fmt: skip


def guess() -> tuple[Any, Any]:
    model = magika.Magika()
    here = sorted(Path(__file__).parent.glob("*.py"))
    found = [
        *[model.identify_bytes(text) for text in TEXTS],
        *model.identify_paths(here),
        model.identify_path(sys.executable),
        model.identify_path(os.__file__),
    ]
    return [(str(one.output.label), str(one.dl.label), one.score) for one in found], model


if __name__ == "__main__":
    show(guess)
