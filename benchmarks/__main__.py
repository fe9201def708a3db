"""``python -m benchmarks [overhead] [reclaim]``: runs them, all if none is named, and prints their tables."""

import argparse

from benchmarks import overhead, reclaim

ALL = {"overhead": overhead.main, "reclaim": reclaim.main}

parser = argparse.ArgumentParser(prog="python -m benchmarks")
parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ALL)}")
for name in parser.parse_args().names or ALL:
    if name not in ALL:
        parser.error(f"{name} is none of {', '.join(ALL)}")
    print(f"\n{name}\n{'=' * len(name)}")
    ALL[name]([])
