"""The load cache against in-process onnxruntime, whatever happens to its files.

``python -m tests.fuzz.cache --help``.

Each step takes a model and options, loads it with an entry of the cache that is whole, damaged, of another
model, old or half written, and compares the answers bit for bit, and what the model says of itself.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

# Before the first import of onnxruntime.
os.environ.update(ORT_DISABLE_TELEMETRY="1", ONNX_DL_CACHE="on", ONNX_DL_STABLE_AFTER="0")

import psutil

from onnx_dl import InferenceSessionProxy, ModelHost
from onnx_dl.errors import WorkerDied
from onnx_dl.workers.load_cache.store import Cache, CacheEntry
from tests.fuzz import file_damage
from tests.fuzz import steps as fuzzing
from tests.fuzz.model_variants import PLAIN, VARIANTS, Variant
from tests.fuzz.steps import Wrong
from tests.support import zoo
from tests.support.waiting import eventually, is_process

SAVED: Final = 120.0
"""Seconds that a save may take: savers run when nobody else wants to."""
NEW: Final = 0.25
"""How often a step takes a model that is not saved yet."""
WEIGHTS: Final = {
    "whole": 2, "damage": 12, "swap": 3, "stale": 3, "replace_loaded": 2, "killed": 2, "heal": 1, "never": 1,
}  # fmt: skip
DAMAGE: Final = tuple(file_damage.OF_FILES)


class Saved:
    """A variant with its entry as it was written."""

    def __init__(self, variant: Variant, entry: CacheEntry, copy: Path) -> None:
        self.variant = variant
        self.key = entry.key
        self.path = entry.path
        self.copy = copy
        shutil.copytree(entry.path, copy)
        (copy / "verified").unlink(missing_ok=True)

    def restore(self) -> None:
        """The entry is what it was; nobody has verified it yet."""
        file_damage.remove(self.path)
        shutil.copytree(self.copy, self.path)


class Library:
    """Models in a folder, a cache, a host that saves and one that only loads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Cache(folder / "cache", 1 << 40)
        self.saved: list[Saved] = []
        self.mapped = self.plain = 0
        os.environ["ONNX_DL_CACHE_DIR"] = str(self.store.root)
        self.saver = _host(0)
        self.loader = _host(1_000_000)

    def any_saved(self, rng: random.Random) -> Saved:
        """A model with an entry that is whole."""
        left = [variant for variant in VARIANTS if variant not in [s.variant for s in self.saved]]
        if left and (len(self.saved) < 2 or rng.random() < NEW):
            self.save(rng.choice(left))
            return self.saved[-1]
        saved = rng.choice(self.saved)
        saved.restore()
        return saved

    def save(self, variant: Variant) -> None:
        variant.write(self.folder)
        before = {entry.key for entry in self.store.entries()}
        with self.open(variant, self.saver) as proxy:
            self.check(variant, proxy)
            (entry,) = self.await_entries(before)
        self.saved.append(Saved(variant, entry, self.folder / f"copy{len(self.saved)}"))

    def await_entries(self, before: set[str]) -> list[CacheEntry]:
        """What was saved since; nobody saves any more."""
        new: list[CacheEntry] = []

        def is_there() -> bool:
            new[:] = [entry for entry in self.store.entries() if entry.key not in before]
            return bool(new) and not self.savers()

        eventually(is_there, "something was saved", SAVED)
        return new

    def savers(self) -> list[psutil.Process]:
        """And what they forked."""
        found = []
        with contextlib.suppress(psutil.Error):
            supervisor = psutil.Process(self.saver.snapshot().supervisor_pid)
            for child in supervisor.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if is_process(child, "saver"):
                        found.append(child)
        return found

    def open(self, variant: Variant, host: ModelHost) -> InferenceSessionProxy:
        return InferenceSessionProxy(
            variant.source(self.folder), variant.options(), variant.providers, host=host
        )

    def look(self, saved: Saved, times: int = 1) -> str:
        """Loads the model, so many times; every time it is the model."""
        found = []
        for _ in range(times):
            with self.open(saved.variant, self.loader) as proxy:
                self.check(saved.variant, proxy)
                found.append(self.is_mapped(proxy))
                proxy.unload()
        self.mapped += sum(found)
        self.plain += len(found) - sum(found)
        return f"{saved.variant.name}, {['plain', 'mapped'][found[-1]]}"

    def check(self, variant: Variant, proxy: InferenceSessionProxy, like: Variant | None = None) -> None:
        """``like``: the model that lies there now."""
        expected = (like or variant).expected(self.folder)
        for feed, wanted in expected.answers:
            if (text := zoo.difference(proxy.run(None, feed), wanted)) is not None:
                raise Wrong(f"{variant.name}: {text}")
        if (text := zoo.difference(variant.said_by(proxy), expected.said)) is not None:
            raise Wrong(f"{variant.name} says of itself: {text}")

    def until_quiet(self) -> None:
        """Nobody saves."""
        eventually(lambda: not self.savers(), "the end of the savers", SAVED)

    def await_whole(self, saved: Saved) -> None:
        """The entry is there again."""
        eventually(
            lambda: self.store.find(saved.key) is not None and not self.savers(),
            f"{saved.variant.name} was saved again",
            SAVED,
        )

    def is_mapped(self, proxy: InferenceSessionProxy) -> bool:
        key, models = proxy._handle.spec.key, proxy._handle.host.snapshot().models
        pids = [status.pid for status in models if status.key == key and status.pid is not None]
        if len(pids) != 1:
            raise Wrong(f"{key} has just been called, and has these workers: {pids} of {models}")
        (pid,) = pids
        return str(self.store.root) in Path(f"/proc/{pid}/maps").read_text()

    def close(self) -> None:
        self.saver.close()
        self.loader.close()


def _host(cache_from: float) -> ModelHost:
    """Its workers read the environment as it is when it starts."""
    os.environ["ONNX_DL_CACHE_FROM"] = str(cache_from)
    host = ModelHost()
    host.start()
    return host


# --- steps -----------------------------------------------------------------------------------------------


def whole(library: Library, rng: random.Random) -> str:
    """Nothing happened to it: it is mapped, the second time without a look at every byte."""
    saved = library.any_saved(rng)
    before = library.mapped
    said = library.look(saved, 2)
    if library.mapped - before != 2:
        raise Wrong(f"{saved.variant.name} was saved, and is not mapped.")
    return said


def damage(library: Library, rng: random.Random) -> str:
    """One of its files is cut off, flipped, gone, another kind of file: verified before, or not."""
    saved = library.any_saved(rng)
    if rng.random() < 0.5:
        library.look(saved)
    file = saved.path / rng.choice(sorted(os.listdir(saved.path)))
    kind = rng.choice(DAMAGE)
    file_damage.OF_FILES[kind](file, rng)
    return f"{kind} {file.name}: {library.look(saved, rng.randint(1, 2))}"


def swap(library: Library, rng: random.Random) -> str:
    """A file, or all of them, are those of another model's entry, of the same form if there is one."""
    library.any_saved(rng)
    saved = library.any_saved(rng)
    others = [one for one in library.saved if one is not saved]
    alike = [one for one in others if one.variant.form == saved.variant.form]
    other = rng.choice(alike or others)
    names = rng.choice([["model.onnx"], ["weights.bin"], ["meta.json"], ["model.onnx", "weights.bin"],
                        ["model.onnx", "weights.bin", "meta.json"]])  # fmt: skip
    if rng.random() < 0.5:
        library.look(saved)
    for name in names:
        if (other.copy / name).exists():
            shutil.copy2(other.copy / name, saved.path / name)
    return f"{names} of {other.variant.name}: {library.look(saved)}"


def stale(library: Library, rng: random.Random) -> str:
    """The model's own files are others, and then the old ones again."""
    saved = library.any_saved(rng)
    if not saved.variant.has_files:
        return "has no files"
    with (
        saved.variant.changed(library.folder, rng) as other,
        library.open(saved.variant, library.loader) as proxy,
    ):
        library.check(saved.variant, proxy, other)
        proxy.unload()
    return f"and back: {library.look(saved)}"


def replace_loaded(library: Library, rng: random.Random) -> str:
    """Its entry goes while it is mapped."""
    saved = library.any_saved(rng)
    with library.open(saved.variant, library.loader) as proxy:
        library.check(saved.variant, proxy)
        if rng.random() < 0.5:
            library.store.discard(saved.key)
        else:
            file_damage.remove(saved.path)
        library.check(saved.variant, proxy)
        proxy.unload()
    return library.look(saved)


def killed(library: Library, rng: random.Random) -> str:
    """A save that is killed somewhere on its way, and what it leaves; then one that is not."""
    saved = library.any_saved(rng)
    file_damage.remove(saved.path)
    with library.open(saved.variant, library.saver) as proxy:
        proxy.load()
        pause, number = rng.random() * 2, rng.randrange(3)
        time.sleep(pause)
        for process in library.savers()[number:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        library.check(saved.variant, proxy)
    library.until_quiet()
    left = sorted(path.name.partition("-")[0] for path in library.store.root.iterdir() if "-" in path.name)
    return f"after {pause:.2f} s, left {left}: {library.look(saved)}"


def heal(library: Library, rng: random.Random) -> str:
    """A damaged entry is replaced by a whole one after the next load that is not by it."""
    saved = library.any_saved(rng)
    kind = rng.choice(DAMAGE)
    file = saved.path / rng.choice(["model.onnx", "meta.json"])
    file_damage.OF_FILES[kind](file, rng)
    with contextlib.suppress(WorkerDied), library.open(saved.variant, library.saver) as proxy:
        library.check(saved.variant, proxy)
        is_healed = library.is_mapped(proxy)
        if not is_healed:
            library.await_whole(saved)
    return f"{kind} {file.name}, {'no harm' if is_healed else 'healed'}: {library.look(saved)}"


def never(library: Library, rng: random.Random) -> str:
    """With options that are not known to be harmless, nothing is saved."""
    variant = rng.choice(PLAIN)
    variant.write(library.folder)
    before = {entry.key for entry in library.store.entries()}
    with library.open(variant, library.saver) as proxy:
        library.check(variant, proxy)
    library.until_quiet()
    if new := {entry.key for entry in library.store.entries()} - before:
        raise Wrong(f"{variant.name} was saved: {new}")
    return variant.name


STEPS: Final = {
    "whole": whole, "damage": damage, "swap": swap, "stale": stale,
    "replace_loaded": replace_loaded, "killed": killed, "heal": heal, "never": never,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    given = fuzzing.arguments("fuzz_cache", WEIGHTS, argv)
    descriptors = len(os.listdir("/proc/self/fd")) + 1
    with tempfile.TemporaryDirectory() as folder:
        library = Library(Path(folder))
        steps: dict[str, Any] = {name: functools.partial(step, library) for name, step in STEPS.items()}
        try:
            status = fuzzing.Player("fuzz_cache", given, WEIGHTS).play(steps)
        finally:
            library.close()
    print(f"{library.mapped} loads were mapped, {library.plain} plain; {len(library.saved)} models")
    steps.clear()
    return fuzzing.ended(status, descriptors)


if __name__ == "__main__":
    sys.exit(main())
