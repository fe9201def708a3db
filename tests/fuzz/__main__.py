"""``python -m tests.fuzz --frames N --seed S``: decoders, or with ``--live`` the sockets of a host."""

from __future__ import annotations

import argparse
import os
import time

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # which opens files, and starts a thread
os.environ["ONNX_DL_CACHE"] = "off"

from tests.fuzz import live, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="a part of the name of a decoder")
    parser.add_argument("--live", action="store_true", help="on the sockets of a host that is in use")
    told = parser.parse_args()
    began = time.monotonic()
    feed = live.feed if told.live else run.feed
    for name, count in sorted(feed(told.frames, told.seed, told.only).items()):
        print(f"{count:9d} {name}")
    print(f"{told.frames} frames, seed {told.seed}, {time.monotonic() - began:.0f} s: nothing found")


if __name__ == "__main__":
    main()
