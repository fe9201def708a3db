"""The table of what one process serves: finds versions by name, and keeps their proxies open while they are
used.  Thread-safe; a table is replaced as a whole."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from typing import Final

from onnx_dl.client.host_client import HostClient
from onnx_dl.server.interfaces import IndexRow, Served, ServedTable
from onnx_dl.server.repository import specs
from onnx_dl.server.repository.plan import is_same
from onnx_dl.server.v2.failures import RequestFailure, invalid, not_found
from onnx_dl.session.inference_session import InferenceSessionProxy

UNLOADED: Final = "unloaded"
"""Reason of a version that a client has unloaded."""
_VERSION: Final = re.compile(r"[0-9]{1,19}", re.ASCII)


class UsedModel:
    """One version, its proxy, and the number of uses.  The proxy closes when the table has no place for it
    any more and the last use has ended."""

    def __init__(self, entry: Served, host: HostClient, *, takes_any: bool = False) -> None:
        self.entry = entry
        self.proxy = InferenceSessionProxy.of_spec(
            specs.spec_of(entry), specs.terms(entry.arguments), host=host
        )
        # A worker of that file is the right one, though the file may have been replaced by one that does not
        # load.  A worker that has read another file would not fit the signature.
        is_whole = specs.is_whole_key(entry.generation)
        self.proxy._handle.seen = entry.identity if is_whole else None
        self.proxy._handle.takes_any = takes_any and is_whole
        self._lock = threading.Lock()
        self._uses = 0
        self._is_retired = False
        self.gone = threading.Event()
        """Set when the proxy is closed."""

    def enter(self) -> bool:
        """Begins a use.  False: the proxy is closed, look for a newer one."""
        with self._lock:
            if self.gone.is_set():
                return False
            self._uses += 1
            return True

    def leave(self) -> None:
        """Ends a use."""
        with self._lock:
            self._uses -= 1
            is_last = self._is_retired and not self._uses
            if is_last:
                self.gone.set()
        if is_last:
            self.proxy.close()

    def retire(self) -> None:
        """Closes the proxy, now or after the last use."""
        with self._lock:
            is_last = not (self._uses or self.gone.is_set())
            self._is_retired = True
            if is_last:
                self.gone.set()
        if is_last:
            self.proxy.close()


class ModelTable:
    """Versions that this process serves.  Implements :class:`~onnx_dl.server.interfaces.Models`."""

    def __init__(self, host: HostClient, *, takes_any: bool = False) -> None:
        """
        Args:
            host: the host that its proxies are clients of.
            takes_any: nobody follows the files, so a file that was overwritten while its model was not loaded
                is loaded as it is.
        """
        self._host = host
        self._takes_any = takes_any
        self._lock = threading.Lock()
        self._table = ServedTable()
        self._served: dict[str, dict[str, UsedModel]] = {}
        """Versions by name, the newest last.  Replaced as a whole, so readers take no lock."""
        self._prepared: dict[tuple[str, str], UsedModel] = {}

    @property
    def table(self) -> ServedTable:
        return self._table

    def apply(self, table: ServedTable) -> list[UsedModel]:
        """Serves this table from now on.  What it no longer has is closed after its last use.

        Applying the same table again changes nothing.

        Returns:
            What was taken out; each has an event for its end.
        """
        with self._lock:
            before = {_place(used.entry): used for used in self._all()}
            now: dict[str, dict[str, UsedModel]] = {}
            kept: set[int] = set()
            for entry in table.served:
                used = self._fitting(entry, before.get(_place(entry)))
                kept.add(id(used))
                now.setdefault(entry.name, {})[entry.version] = used
            for versions in now.values():
                ordered = sorted(versions.items(), key=lambda item: int(item[0]))
                versions.clear()
                versions.update(ordered)
            self._table, self._served = table, now
            leaving = [used for used in before.values() if id(used) not in kept]
        for used in leaving:
            used.retire()
        return leaving

    def prepare(self, entry: Served) -> UsedModel:
        """A proxy of a version that the next table will have.  The caller loads it, and drops it by
        :meth:`discard` if it is not to be served."""
        with self._lock:
            served = self._served.get(entry.name, {}).get(entry.version)
            for found in (served, self._prepared.get(_place(entry))):
                if found is not None and is_same(found.entry, entry):
                    return found
            used = self._new(entry)
            replaced = self._prepared.pop(_place(entry), None)
            self._prepared[_place(entry)] = used
        if replaced is not None:
            replaced.retire()
        return used

    def discard(self, entry: Served) -> None:
        """Gives up a version that was prepared and is not in the table."""
        with self._lock:
            found = self._prepared.get(_place(entry))
            if found is None or not is_same(found.entry, entry):
                return
            del self._prepared[_place(entry)]
        found.retire()

    def close(self) -> None:
        """Closes all proxies after their last uses."""
        self.apply(ServedTable())
        with self._lock:
            prepared, self._prepared = list(self._prepared.values()), {}
        for used in prepared:
            used.retire()

    def find(self, name: str, version: str = "") -> Served:
        """The version that is served, the newest if ``version`` is empty.

        Raises:
            RequestFailure: 404: it is not served; 400: ``version`` is no number; 503: it cannot be served,
                with the reason.
        """
        return self._find(name, version).entry

    @contextlib.contextmanager
    def use(self, name: str, version: str = "") -> Iterator[UsedModel]:
        """Keeps the version's proxy open for the block.  Raises like :meth:`find`."""
        while True:
            used = self._find(name, version)
            if used.enter():  # else it was replaced between the two steps
                break
        try:
            yield used
        finally:
            used.leave()

    def versions(self, name: str) -> list[str]:
        """Versions that are served, the newest last; empty: none."""
        return list(self._served.get(name, ()))

    def check_ready(self, name: str, version: str = "") -> None:
        """Raises if the version cannot be inferred now, as far as is known.  One that is not loaded is ready,
        because it loads on use.

        Raises:
            RequestFailure: like :meth:`find`; 503: its load has failed.
        """
        entry = self.find(name, version)
        for row in self._rows(name, entry.version):
            if row.state != "READY":
                text = f"Request for unknown model: '{name}' version {row.version} is not at ready state"
                raise RequestFailure(503, "UNAVAILABLE", f"{text}: {row.reason}", reason="BACKEND")

    def _all(self) -> list[UsedModel]:
        return [used for versions in self._served.values() for used in versions.values()]

    def _fitting(self, entry: Served, present: UsedModel | None) -> UsedModel:
        """The proxy for an entry: the present one, the prepared one, or one made now."""
        prepared = self._prepared.pop(_place(entry), None)
        if present is not None and is_same(present.entry, entry):
            present.entry = entry
            if prepared is not None:
                prepared.retire()
            return present
        if prepared is not None and is_same(prepared.entry, entry):
            prepared.entry = entry
            return prepared
        if prepared is not None:
            self._prepared[_place(entry)] = prepared  # for a later table
        return self._new(entry)

    def _new(self, entry: Served) -> UsedModel:
        return UsedModel(entry, self._host, takes_any=self._takes_any)

    def _find(self, name: str, version: str) -> UsedModel:
        versions = self._served.get(name)
        if version and not _VERSION.fullmatch(version):
            raise invalid(
                f"failed to get model version from specified version string '{version}', "
                "version should be an integral value > 0"
            )
        if versions:
            number = version.lstrip("0") if version else next(reversed(versions))
            if (used := versions.get(number)) is not None:
                return used
        raise _absent(name, version, self._rows(name, version))

    def _rows(self, name: str, version: str) -> list[IndexRow]:
        return [row for row in self._table.rows if row.name == name and version in ("", row.version)]


def _absent(name: str, version: str, rows: list[IndexRow]) -> RequestFailure:
    """The refusal of a version that is not served, in Triton's words."""
    what = f"Request for unknown model: '{name}'"
    if version:
        text = f"{what} version {version} is not {'at ready state' if rows else 'found'}"
    else:
        text = f"{what} {'has no available versions' if rows else 'is not found'}"
    broken = [row for row in rows if row.state == "UNAVAILABLE" and row.reason not in ("", UNLOADED)]
    if broken:  # the server's files are at fault, not the request
        return RequestFailure(503, "UNAVAILABLE", f"{text}: {broken[-1].reason}", reason="BACKEND")
    if any(row.state == "LOADING" for row in rows):
        return RequestFailure(503, "UNAVAILABLE", f"{text}: it loads", retry_after=1.0, reason="BACKEND")
    return not_found(text)


def _place(entry: Served) -> tuple[str, str]:
    return entry.name, entry.version
