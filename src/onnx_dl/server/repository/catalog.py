"""Reads what could be served: repositories, single files and models of a host's file, as candidates.

Looks at the disk, so it runs in a thread.  What is done with the candidates is decided elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from onnx_dl.core import model_files
from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.terms import Terms
from onnx_dl.errors import ConfigError
from onnx_dl.server.interfaces import Served
from onnx_dl.server.repository import completion, config, layout, signature, specs, versions
from onnx_dl.server.repository.config import Configuration
from onnx_dl.server.repository.layout import Folder
from onnx_dl.server.repository.signature import ModelSignature, Unservable
from onnx_dl.server.repository.source import Refused, Source

FileStates = tuple[model_files.Identity | None, ...]
"""States of a model's file and of its external data."""


class NamedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is served beside the repositories.

    Attributes:
        name: of the model; it has version 1.
        path: of its file.
        place: where it was named, for messages: ``--model NAME=PATH``, or file and table.
        spec, terms: how it is loaded and held; None: by the defaults of a repository's model.
        is_eager: it is loaded at the start.
    """

    name: str
    path: str
    place: str
    spec: ModelSpec | None = None
    terms: Terms | None = None
    is_eager: bool = False


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One model as it is on the disk now.

    Attributes:
        name: of the model.
        place: where it is, for messages.
        problem: why no version can be served; empty: some can.
        is_unreadable: which versions are on the disk is not known.
        there: versions that are on the disk.
        entries: versions that the policy selects and that can be served.
        broken: reasons of selected versions that cannot, by version.
        unread: versions among ``entries`` whose signature a load must tell, and what it completes.
        files: states of the files of selected versions, so that another content is another candidate.
        warmups: what to run after a load, in Triton's JSON form.
        notes: what is told once in the log.
    """

    name: str
    place: str
    problem: str = ""
    is_unreadable: bool = False
    there: tuple[str, ...] = ()
    entries: tuple[Served, ...] = ()
    broken: dict[str, str] = {}
    unread: tuple[str, ...] = ()
    files: tuple[FileStates, ...] = ()
    warmups: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()


class Catalog:
    """Reads candidates, and remembers the signatures of files that have not changed.

    Used by one thread at a time.  Raises ConfigError: a model's name cannot be part of a path.
    """

    def __init__(self, roots: Sequence[str], named: Sequence[NamedModel] = ()) -> None:
        for model in named:
            _check_name(model)
        self._roots = [os.path.abspath(root) for root in roots]
        self._named = list(named)
        self._signatures: dict[tuple[str, model_files.Identity], ModelSignature | Unservable] = {}
        self._external: dict[tuple[str, model_files.Identity], tuple[str, ...]] = {}
        self._configurations: dict[
            str, tuple[tuple[str | None, str | None], Configuration, Source | None]
        ] = {}
        """Configurations by place, with the texts that they were read from."""
        self._last: dict[str, tuple[object, Candidate]] = {}
        """The last candidate by place, and all that it was made of."""

    def read(self, overrides: Mapping[str, str] | None = None) -> dict[str, Candidate]:
        """All candidates by name.

        Args:
            overrides: JSON of configurations that replace those of the files, by model.

        Raises:
            OSError: a repository's folder cannot be listed; ``filename`` is its path.
        """
        folders = [folder for root in self._roots for folder in _listed(root)]
        self._forget(len(folders) + len(self._named))
        return self._candidates(folders, self._named, overrides or {})

    def read_one(self, name: str, override: str | None = None) -> Candidate | None:
        """The candidate of one model; None: there is none of this name."""
        folders = []
        if name and "/" not in name and "\0" not in name and not name.startswith("."):
            roots = [root for root in self._roots if os.path.isdir(os.path.join(root, name))]
            folders = [layout.read_model(root, name) for root in roots]
        named = [each for each in self._named if each.name == name]
        overrides = {} if override is None else {name: override}
        return self._candidates(folders, named, overrides).get(name)

    def learn(self, entry: Served, found: ModelSignature | Unservable) -> None:
        """Remembers what a load has told about a file that cannot be read without one."""
        if (identity := model_files.identity(entry.path)) is not None:
            self._signatures[entry.path, identity] = found

    def _candidates(
        self, folders: Iterable[Folder], named: Iterable[NamedModel], overrides: Mapping[str, str]
    ) -> dict[str, Candidate]:
        found: dict[str, Candidate] = {}
        for folder in folders:
            _add(found, self._of_folder(folder, overrides.get(folder.name)))
        for model in named:
            _add(found, self._of_file(model, overrides.get(model.name)))
        return found

    def _of_folder(self, folder: Folder, override: str | None) -> Candidate:
        there = tuple(str(number) for number in sorted(folder.versions))
        blank = Candidate(name=folder.name, place=folder.path, there=there)
        if folder.problem:
            return msgspec.structs.replace(blank, problem=folder.problem, is_unreadable=folder.is_unreadable)
        try:
            found, source = self._configuration(folder.name, folder.config, folder.config_path, override)
        except Refused as error:
            return msgspec.structs.replace(blank, problem=str(error))
        numbers = versions.selected(found.policy, folder.versions.keys())
        paths = {
            number: layout.model_file(os.path.join(folder.path, str(number)), names, found.filename)
            for number, names in folder.versions.items()
            if number in numbers
        }
        broken = {
            str(number): f"there is no folder {os.path.join(folder.path, str(number))}"
            for number in versions.missing(found.policy, folder.versions.keys())
        }
        return self._completed(blank, paths, found, source, broken)

    def _of_file(self, model: NamedModel, override: str | None) -> Candidate:
        blank = Candidate(name=model.name, place=model.place, there=("1",))
        try:
            found, source = self._configuration(model.name, None, model.place, override)
        except Refused as error:
            return msgspec.structs.replace(blank, problem=str(error))
        if model.spec is not None and model.terms is not None:  # also where a load has a configuration
            found = msgspec.structs.replace(
                found, arguments=specs.arguments_of(model.spec, model.terms), is_eager=model.is_eager
            )
        return self._completed(blank, {1: os.path.abspath(model.path)}, found, source, {})

    def _completed(
        self,
        blank: Candidate,
        paths: Mapping[int, str],
        found: Configuration,
        source: Source | None,
        broken: dict[str, str],
    ) -> Candidate:
        entries: list[Served] = []
        unread: list[str] = []
        files = tuple(self._states(path) for _, path in sorted(paths.items()))  # before they are read
        plain = None if source is None else source.plain
        made_of = (blank, sorted(paths.items()), files, found, plain, dict(broken))
        last = self._last.get(blank.place)
        if last is not None and last[0] == made_of and not last[1].unread:
            return last[1]
        may_pass = False
        for number, path in sorted(paths.items()):
            try:
                entry, is_read = self._entry(blank.name, number, path, found, source)
            except Refused as error:  # the configuration is at fault, for all versions
                broken[str(number)] = str(error)
            except (Unservable, ConfigError) as error:
                broken[str(number)] = f"{path}: {error}"
            except OSError as error:
                broken[str(number)] = f"{error.filename or path}: {error.strerror or error}"
                may_pass = True
            else:
                entries.append(entry)
                if not is_read:
                    unread.append(entry.version)
        problem = "" if entries or broken else f"{blank.place} has none of the versions that its policy names"
        made = msgspec.structs.replace(
            blank,
            problem=problem,
            entries=tuple(entries),
            broken=broken,
            unread=tuple(unread),
            files=files,
            warmups=found.warmups,
            notes=(*(() if source is None else source.notes), *self._left_out(entries, found)),
        )
        if not may_pass:  # else it is read again: the end of such an error does not show in a file's state
            self._last[blank.place] = made_of, made
        return made

    def _left_out(self, entries: Iterable[Served], found: Configuration) -> list[str]:
        """Notes on outputs that the protocol has no words for, if the configuration names none."""
        if found.outputs:
            return []
        return [
            f"{entry.path}: {problem}; this output is left out"
            for entry in entries
            if (identity := model_files.identity(entry.path)) is not None
            and (known := self._signature(entry.path, identity)) is not None
            for problem in known.problems.values()
        ]

    def _configuration(
        self, name: str, text: str | None, place: str, override: str | None
    ) -> tuple[Configuration, Source | None]:
        """Reads a configuration, unless it is the last one of its place.  Raises Refused."""
        known = self._configurations.get(place)
        if known is not None and known[0] == (text, override):
            return known[1:]
        source = _source(name, text, place, override)
        found = Configuration() if source is None else config.understood(source, name)
        if override is not None and text is not None:
            limits = config.understood(Source.of_text(text, place), name).arguments
            found = msgspec.structs.replace(found, arguments=specs.within(limits, found.arguments))
        self._configurations[place] = (text, override), found, source
        return found, source

    def _states(self, path: str) -> FileStates:
        """The states of a model's file and of its external data; empty: there is no file."""
        identity = model_files.identity(path)
        if identity is None:
            return ()
        try:
            names = self._external_files(path, identity)
        except OSError:
            names = ()
        folder = os.path.dirname(path)
        return identity, *(model_files.identity(os.path.join(folder, name)) for name in names)

    def _entry(
        self, name: str, number: int, path: str, found: Configuration, source: Source | None
    ) -> tuple[Served, bool]:
        """A version, and whether its signature is known."""
        stat = os.stat(path)
        identity = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        external = self._external_files(path, identity)
        states = tuple(
            (each, model_files.identity(os.path.join(os.path.dirname(path), each))) for each in external
        )
        absent = [each for each, state in states if state is None]
        if absent:
            raise Unservable(f"its external data {absent[0]} is not there")
        known = self._signature(path, identity)
        completed = completion.complete(
            name, os.path.basename(path), known or ModelSignature(), found if known else _blind(found), source
        )
        entry = Served(
            name=name,
            version=str(number),
            path=path,
            generation=specs.generation(path, found.arguments, states),
            identity=identity,
            inputs=completed.inputs,
            outputs=completed.outputs,
            max_batch_size=found.max_batch_size,
            config=completed.config,
            arguments=found.arguments,
            is_eager=found.is_eager,
            max_queue_size=found.max_queue_size,
        )
        return entry, known is not None

    def _signature(self, path: str, identity: model_files.Identity) -> ModelSignature | None:
        """The signature of a file; None: a load must tell it.  Raises Unservable, OSError."""
        found = self._signatures.get((path, identity))
        if found is None:
            if signature.is_ort_format(path):
                return None
            try:
                found = signature.read(path)
            except Unservable as error:
                found = error
            self._signatures[path, identity] = found
        if isinstance(found, Unservable):
            raise Unservable(str(found))
        return found

    def _external_files(self, path: str, identity: model_files.Identity) -> tuple[str, ...]:
        if (found := self._external.get((path, identity))) is None:
            try:
                found = () if signature.is_ort_format(path) else tuple(model_files.external_files(path))
            except ValueError:  # no model; the signature says it in words
                found = ()
            self._external[path, identity] = found
        return found

    def _forget(self, models: int) -> None:
        """Drops what is remembered of old contents, before it grows without end."""
        if len(self._signatures) > 1000 + 100 * models:
            for known in (self._signatures, self._external, self._configurations, self._last):
                known.clear()


def _listed(root: str) -> list[Folder]:
    try:
        return layout.read(root)
    except OSError as error:
        raise OSError(error.errno, error.strerror, root) from None


def _source(name: str, text: str | None, file: str, override: str | None) -> Source | None:
    """The configuration of a model; None: there is none.  Raises Refused."""
    if override is not None:
        return Source.of_json(override, f"the config parameter for '{name}'")
    return None if text is None else Source.of_text(text, file)


def _blind(found: Configuration) -> Configuration:
    """A configuration without what can only be compared with a signature."""
    return msgspec.structs.replace(found, inputs=(), outputs=())


def _add(found: dict[str, Candidate], candidate: Candidate) -> None:
    """Adds a candidate; two of one name are refused, because nobody can say which one was meant."""
    other = found.get(candidate.name)
    if other is None:
        found[candidate.name] = candidate
        return
    problem = f"there are two models of the name '{candidate.name}': {other.place} and {candidate.place}"
    there = tuple(sorted({*other.there, *candidate.there}, key=int))
    found[candidate.name] = Candidate(name=candidate.name, place=other.place, there=there, problem=problem)


def _check_name(model: NamedModel) -> None:
    name = model.name
    if not name.strip() or not name.isprintable() or set(name) & set("/\\") or name in (".", ".."):
        raise ConfigError(
            f"{model.place}: {name[:80]!r} is not a name for a model: use printable text without / and \\."
        )
