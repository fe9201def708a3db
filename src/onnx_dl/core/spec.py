"""A model as plain frozen data: its key, how to load it, its metadata, its status.

Knows neither onnxruntime nor processes.  All structs here travel between processes as they are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any, TypeAlias

import msgspec

from onnx_dl.core import digests
from onnx_dl.core.environment import NOTHING, Environment
from onnx_dl.core.status import to_plain
from onnx_dl.errors import ConfigError

PlainFields: TypeAlias = dict[str, Any]
"""Names to data that msgpack has: None, bools, numbers, text, and lists and dicts of these."""

_FOLDER_OF_BYTES = "session.model_external_initializers_file_folder_path"
"""onnxruntime's option for the folder of external data of a model given as bytes."""
_ONCE_PER_PROCESS = ("session.set_denormal_as_zero",)
"""Options that onnxruntime applies to the first session of a process only."""


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Description of how to load a model: all that a worker needs.

    ``path`` is as the user gave it, relative to ``cwd``; ``blob`` is the SHA-256 of a model given as bytes.
    Exactly one of the two is set.  ``engine`` is the module in :mod:`onnx_dl.workers` that runs it.
    ``options``, ``providers``, ``provider_options`` and ``extra`` are onnxruntime's arguments as plain data
    (:mod:`onnx_dl.ort.options`); ``memory`` names the shared memory that holds the arrays in ``options``;
    ``surroundings`` are settings of the whole process (:mod:`onnx_dl.ort.recorder`).  A worker with more than
    ``max_memory`` bytes of its own after a call, or after ``max_runs`` calls, is replaced; one with more than
    ``max_memory_hard`` during a call ends itself.  Models of the same ``group`` share one worker, whose own
    spec (:func:`group_spec`) has them as ``members``.  The worker starts with the ``environment``, loads only
    files with the digests ``sha256`` (:mod:`onnx_dl.core.digests`), and has no more rights than it needs if
    ``sandbox`` is true.
    """

    key: str
    name: str
    cwd: str
    engine: str = "ort"
    path: str | None = None
    blob: str | None = None
    memory: str | None = None
    options: dict[str, Any] | None = None
    providers: list[Any] | None = None
    provider_options: list[Any] | None = None
    extra: dict[str, Any] = {}
    surroundings: dict[str, Any] = {}
    max_memory: int | None = None
    max_memory_hard: int | None = None
    max_runs: int | None = None
    group: str | None = None
    members: list[ModelSpec] = []
    environment: Environment = NOTHING
    isolation: bool = True
    """False: the model runs in the application's own process."""
    sha256: dict[str, str] = {}
    sandbox: bool = False

    @property
    def blobs(self) -> list[str]:
        """Names of the memory that the model, or all members of a group, are loaded from."""
        own = [self.blob, self.memory, *(name for member in self.members for name in member.blobs)]
        return list(dict.fromkeys(name for name in own if name is not None))

    @property
    def provider_names(self) -> tuple[str, ...]:
        """Names of the execution providers, without their options."""
        names = [item[0] if isinstance(item, list) and item else item for item in self.providers or ()]
        return tuple(name for name in names if isinstance(name, str))

    def where(self, name: str) -> str:
        """The path at which onnxruntime looks for a file of the model, by its name in :class:`ReadFile`:
        beside the model as it was given, which may be a link to a file elsewhere."""
        if self.path is not None:
            own = os.path.join(self.cwd, self.path)
            return os.path.join(os.path.dirname(own), name) if name else own
        config = (self.options or {}).get("config", {})
        return os.path.join(self.cwd, config.get(_FOLDER_OF_BYTES, ""), name)

    @property
    def pristine(self) -> bool:
        """True if it needs a process in which onnxruntime has made no session yet."""
        config = (self.options or {}).get("config", {})
        return any(config.get(name) == "1" for name in _ONCE_PER_PROCESS) or any(
            member.pristine for member in self.members
        )

    @property
    def unit(self) -> str:
        """The key for which a worker is started: of this model, or of its group and its environment."""
        if self.group is None:
            return self.key
        variables = f"#{self.environment.tag}" if self.environment else ""
        return f"group:{self.group}{'#sandbox' if self.sandbox else ''}{variables}"

    @property
    def libraries(self) -> list[str]:
        """Paths of operator and provider libraries, without those that the system's loader finds."""
        named = [
            argument
            for name, args, kwargs in (self.options or {}).get("calls", [])
            if name == "register_custom_ops_library"
            for argument in (*args, *kwargs.values())
        ]
        found = [*named, *self.surroundings.get("libraries", {}).values()]
        return [path for path in found if isinstance(path, str) and os.path.isabs(path)]

    def confinement(self) -> Confinement | None:
        """The rights of the worker of this model, or of a group; None: those of the user."""
        if not self.sandbox:
            return None
        models = self.members or [self]
        return Confinement(
            models=[model.where("") for model in models if model.blob is None],
            blobs={blob_tag(model.blob): model.where("") for model in models if model.blob is not None},
            files=sorted({path for model in models for path in model.libraries}),
            devices=any({*model.provider_names} - {"CPUExecutionProvider"} for model in models),
        )


class Confinement(msgspec.Struct, frozen=True, kw_only=True):
    """Rights of a sandboxed worker.

    ``models``: paths of the models that it may read, with their external data; ``blobs``: the folder of
    external data of each model that was given as bytes, by its tag (:func:`blob_tag`); ``files``: paths of
    more files; ``devices``: it may use accelerators.
    """

    models: list[str] = []
    blobs: dict[str, str] = {}
    files: list[str] = []
    devices: bool = False


def blob_tag(name: str) -> str:
    """A short name for memory that a model is loaded from: 125 of them fit a packet of 4 KiB."""
    return hashlib.blake2s(name.encode(), digest_size=8).hexdigest()


def group_spec(members: Sequence[ModelSpec]) -> ModelSpec:
    """The spec of a group: all its members in one worker.

    The largest memory limits and the smallest ``max_runs`` of its members count.
    """
    first = members[0]
    memory = [member.max_memory for member in members if member.max_memory is not None]
    hard = [member.max_memory_hard for member in members if member.max_memory_hard is not None]
    runs = [member.max_runs for member in members if member.max_runs is not None]
    return ModelSpec(
        key=first.unit,
        name=first.unit,
        cwd=first.cwd,
        engine="group",
        surroundings=first.surroundings,
        members=list(members),
        max_memory=max(memory, default=None),
        max_memory_hard=max(hard, default=None),
        max_runs=min(runs, default=None),
        environment=first.environment,
        sandbox=first.sandbox,
    )


class Warmup(msgspec.Struct, frozen=True):
    """An array of this numpy ``dtype`` (``str``: text) and shape, filled with ``fill``."""

    dtype: str
    shape: tuple[int, ...]
    fill: bool | int | float | str = 0


def file_identity(path: str) -> tuple[str, int, int, int, int]:
    """Identity of one version of a file: real path, device, inode, bytes, mtime in ns.  May raise OSError."""
    real = os.path.realpath(path)
    stat = os.stat(real)
    return real, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def model_identity(path: str) -> tuple[object, ...]:
    """Identity of a model: its file, and the folder in which its external data is looked for.

    Links to one file in different folders are different models.  May raise OSError, as :func:`file_identity`.
    """
    return *file_identity(path), os.path.realpath(os.path.dirname(path))


def model_key(identity: object, *how: object) -> str:
    """A digest of a model's identity and how it is loaded.  Equal keys share one worker."""
    plain = msgspec.json.encode([identity, *how], order="deterministic", enc_hook=to_plain)
    return hashlib.sha256(plain).hexdigest()[:32]


def specify(path: str | None, blob: str | None, cwd: str, how: PlainFields) -> ModelSpec:
    """The spec, with its key, of a model that onnxruntime runs; ``how``: the spec's other fields.

    Programs with different working directories share one worker, unless the directory decides where external
    data of a model given as bytes lies, or a file that onnxruntime writes.

    Raises:
        ConfigError: the path is not UTF-8, or ``sha256`` has no digest for the model itself.
        OSError: the file cannot be looked at.
    """
    try:
        f"{path}{cwd}".encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"The path {path!r} is not valid UTF-8; onnxruntime could not open it either. Rename the file."
        ) from None
    what = model_identity(os.path.join(cwd, path)) if path else blob
    how = how | {"sha256": digests.of_model(how.get("sha256", {}), path)}
    return ModelSpec(
        key=model_key(what, without_trust(how), cwd if path is None or _names_files(how) else ""),
        name=path or f"bytes:{str(blob)[:12]}",
        cwd=cwd,
        path=path,
        blob=blob,
        **how,
    )


def without_trust(how: PlainFields) -> PlainFields:
    """The fields for a key: without ``sha256`` and ``sandbox`` where these are not given, so that the keys of
    other models stay as they were."""
    return {name: value for name, value in how.items() if value or name not in ("sha256", "sandbox")}


def _names_files(how: PlainFields) -> bool:
    """True if an argument of onnxruntime may be a relative path."""
    options = how["options"] or {}
    plain = all(isinstance(provider, str) for provider in how["providers"] or ())
    told = [options.get(name) for name in ("enable_profiling", "optimized_model_filepath", "config")]
    return not plain or any(told) or any(how["provider_options"] or ())


def working_directory() -> str:
    """The working directory; the root if it was removed, so that only absolute paths work."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return "/"
