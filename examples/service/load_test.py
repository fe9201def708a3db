"""Send frames to the service from many clients at once; print latencies, throughput and memory.

It needs httpx, scikit-learn and Pillow.

Usage: ``python load_test.py [--url URL] [--clients 8] [--requests 400] [--images 4]``. The exit code is 1 if
a request failed, or the models took more memory than the limit.
"""

import argparse
import asyncio
import statistics
import time
from collections import Counter
from typing import Any, NamedTuple

import httpx
from frames import encode, load_split, make_frames


class Arguments(NamedTuple):
    url: str
    clients: int
    requests: int
    images: int
    quality_every: int


class Results(NamedTuple):
    """Everything that was seen."""

    statuses: Counter[str]
    latencies: list[float]
    """Seconds of each request that succeeded."""
    stages: dict[str, list[float]]
    """Milliseconds of each frame, by stage."""
    detections: list[int]
    memory: list[int]
    """Bytes that the models' workers have, at every look."""
    limits: list[int]


def arguments() -> Arguments:
    parser = argparse.ArgumentParser(description="Load test of the service.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=8, help="requests at a time")
    parser.add_argument("--requests", type=int, default=400, help="requests in all")
    parser.add_argument("--images", type=int, default=4, help="images of each request")
    parser.add_argument("--quality-every", type=int, default=50, help="every so many, a request for /quality")
    return Arguments(**vars(parser.parse_args()))


async def client(
    http: httpx.AsyncClient, numbers: "asyncio.Queue[int]", given: Arguments, files: list[Any], seen: Results
) -> None:
    """One client: sends one request after the other until none is left."""
    while True:
        try:
            number = numbers.get_nowait()
        except asyncio.QueueEmpty:
            return
        path = "/quality" if number % given.quality_every == given.quality_every - 1 else "/detect"
        chosen = [files[(number * given.images + i) % len(files)] for i in range(given.images)]
        began = time.perf_counter()
        try:
            answer = await http.post(path, files=chosen)
        except httpx.HTTPError as error:
            seen.statuses[type(error).__name__] += 1
            continue
        seen.statuses[f"{path} {answer.status_code}"] += 1
        if answer.status_code == 200 and path == "/detect":
            seen.latencies.append(time.perf_counter() - began)
            for frame in answer.json()["frames"]:
                seen.detections.append(len(frame["detections"]))
                for stage, spent in frame["milliseconds"].items():
                    seen.stages.setdefault(stage, []).append(spent)


def used_by_models(snapshot: dict[str, Any]) -> int:
    """Bytes that workers have. ``memory_in_use`` is more while the host reserves memory for a load."""
    return sum(model["usage"]["pss"] for model in snapshot["models"] if model["usage"] is not None)


async def watch(http: httpx.AsyncClient, seen: Results, end: asyncio.Event) -> None:
    """Look at the host's memory, five times a second."""
    while not end.is_set():
        try:
            snapshot = (await http.get("/models")).raise_for_status().json()
        except httpx.HTTPError as error:
            seen.statuses[f"/models {type(error).__name__}"] += 1
        else:
            seen.memory.append(used_by_models(snapshot))
            if snapshot["memory_limit"] is not None:
                seen.limits.append(snapshot["memory_limit"])
        try:
            await asyncio.wait_for(end.wait(), 0.2)
        except TimeoutError:
            continue


async def run(given: Arguments) -> tuple[Results, float]:
    seen = Results(Counter(), [], {}, [], [], [])
    frames = make_frames(load_split()[1], 64, seed=1)
    files = [("files", (f"{i}.jpg", encode(frame), "image/jpeg")) for i, frame in enumerate(frames)]
    numbers: asyncio.Queue[int] = asyncio.Queue()
    for number in range(given.requests):
        numbers.put_nowait(number)
    end = asyncio.Event()
    async with httpx.AsyncClient(base_url=given.url, timeout=30) as http:
        watcher = asyncio.create_task(watch(http, seen, end))
        began = time.perf_counter()
        await asyncio.gather(*(client(http, numbers, given, files, seen) for _ in range(given.clients)))
        took = time.perf_counter() - began
        end.set()
        await watcher
    return seen, took


def percentiles(values: list[float]) -> str:
    """The median, the 95th and the 99th of a hundred."""
    if len(values) < 2:
        return "too few"
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return f"p50 {cuts[49]:7.1f}   p95 {cuts[94]:7.1f}   p99 {cuts[98]:7.1f}"


def report(seen: Results, took: float, given: Arguments) -> bool:
    """Print it; return whether all went well."""
    for status, count in sorted(seen.statuses.items()):
        print(f"{status:24} {count}")
    frames = len(seen.detections)
    print(f"{frames} frames in {took:.1f} s: {frames / took:.0f} frames/s, {sum(seen.detections)} detections")
    print(f"request of {given.images:2} ms   {percentiles([1000 * seconds for seconds in seen.latencies])}")
    for stage, spent in seen.stages.items():
        print(f"frame, {stage:6} ms   {percentiles(spent)}")
    if not seen.memory:
        return False
    most = max(seen.memory)
    holds = not seen.limits or most <= min(seen.limits)
    limit = f"limit {min(seen.limits) / 1e6:.0f} MB" if seen.limits else "no limit"
    print(f"memory of the models: at most {most / 1e6:.0f} MB in {len(seen.memory)} looks, {limit}")
    return holds and all(status.endswith("200") for status in seen.statuses)


def main() -> None:
    given = arguments()
    if not report(*asyncio.run(run(given)), given):
        raise SystemExit("A request failed, or the models took more memory than the limit.")


if __name__ == "__main__":
    main()
