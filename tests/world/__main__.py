"""``python -m tests.world --transitions N --seed S``, or ``--turns N`` for :mod:`tests.world.turns`."""

from __future__ import annotations

import argparse
import time

from tests.world import turns
from tests.world.machine import Machine, walk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transitions", type=int, default=100_000)
    parser.add_argument("--turns", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    told = parser.parse_args()
    if told.turns:
        print(dict(turns.walk(told.turns, told.seed)))
        return
    began, seed = time.monotonic(), told.seed
    while Machine.done < told.transitions:
        walk(min(told.transitions - Machine.done, 100_000), seed=seed)
        print(f"{Machine.done} transitions, {Machine.events} events, to seed {seed}", flush=True)
        seed += 1
    print(f"nothing found, in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
