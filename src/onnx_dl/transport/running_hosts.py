"""The shared hosts of this user that run now, of all protocol versions, and which of them replaces which.

A program connects only to the host of its own protocol version (:mod:`onnx_dl.transport.rendezvous`).  The
hosts of other versions are listed here: for commands that show them, and for a host that has to end because a
host of another version was started later.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from onnx_dl.errors import ConfigError
from onnx_dl.protocol.codec import PROTOCOL_VERSION
from onnx_dl.transport.rendezvous import HostEntry, HostRecord, runtime_folder, uptime

_LOCK: Final = re.compile(r"(?P<name>[A-Za-z0-9_.-]{1,64}?)(?:@(?P<protocol>[0-9]{1,9}))?\.lock")


class RunningHost(msgspec.Struct, frozen=True, kw_only=True):
    """A shared host that runs, by its files."""

    name: str
    protocol: int | None
    """Its protocol version; None: one before 5, whose record has no number."""
    pid: int
    package: str = ""
    """Its version of onnx-dl; empty if the record does not have it."""
    started: float | None = None
    """Its start time, by :func:`uptime`; None: it has not written its record yet."""
    managed: bool = False
    """True if it was started by ``onnx-dl supervise``."""

    @property
    def reachable(self) -> bool:
        """True if this version of onnx-dl can talk to it."""
        return self.protocol == PROTOCOL_VERSION

    @property
    def since(self) -> float | None:
        """Its start time as Unix time in seconds."""
        return None if self.started is None else time.time() - (uptime() - self.started)


def running(name: str | None = None, environ: Mapping[str, str] = os.environ) -> list[RunningHost]:
    """Lists the hosts of this name, or of all names, ordered by name and version.

    Must not be called by a host: see :meth:`HostEntry.holder`.  Raises PlatformError if no folder belongs to
    this user alone.
    """
    entries = _entries(runtime_folder(environ))
    return _sorted(host for entry in entries if name in (None, entry.name) for host in _running(entry))


def of_other_versions(entry: HostEntry) -> list[RunningHost]:
    """Lists the hosts with the same name as this entry and another protocol version.  A host may call this,
    too.  A folder that does not exist has no hosts."""
    others = (e for e in _entries(entry.folder) if e.name == entry.name and e.protocol != entry.protocol)
    return _sorted(host for other in others for host in _running(other))


def _entries(folder: Path) -> Iterator[HostEntry]:
    with contextlib.suppress(FileNotFoundError):
        for file in os.listdir(folder):
            if found := _LOCK.fullmatch(file):
                number = found["protocol"]
                protocol = None if number is None else int(number)
                with contextlib.suppress(ConfigError):  # not a file of a host
                    yield HostEntry(found["name"], protocol=protocol, folder=folder)


def _running(entry: HostEntry) -> Iterator[RunningHost]:
    with contextlib.suppress(OSError):  # not a lock file, in spite of its name
        if (pid := entry.holder()) is not None:
            record = entry.record()
            if record is not None and record.pid == pid:
                yield _described_by(entry, record)
            else:  # the record of an earlier host: this one has not written its own yet
                yield RunningHost(name=entry.name, protocol=entry.protocol, pid=pid)


def _described_by(entry: HostEntry, record: HostRecord) -> RunningHost:
    return RunningHost(
        name=entry.name,
        protocol=entry.protocol,
        pid=record.pid,
        package=record.package,
        started=entry.published_at() if entry.protocol is None else record.started,
        managed=record.managed,
    )


def _sorted(found: Iterable[RunningHost]) -> list[RunningHost]:
    return sorted(found, key=lambda host: (host.name, host.protocol or 0))


# --- replacement -------------------------------------------------------------------------------------------


def reason_to_leave(entry: HostEntry) -> str | None:
    """Reason why this process, the host of the entry, must end when its clients have gone; None: it stays."""
    if entry.published is None:
        return None
    if (waiting := entry.next_pid()) is not None:
        return f"onnx-dl supervise (pid {waiting}) waits for its name"
    later = successor(_described_by(entry, entry.published), of_other_versions(entry))
    return None if later is None else f"a host of another version was started after it: {describe(later)}"


def successor(own: RunningHost, others: Iterable[RunningHost]) -> RunningHost | None:
    """The host that replaces ``own``: one of the same name and another version that was started later.

    A managed host makes way only for a newer version.  Otherwise two managed hosts would replace each other
    for ever, because their service managers start them again.
    """
    for other in others:
        newer = (other.protocol or 0) > (own.protocol or 0)
        differs = other.name == own.name and other.protocol != own.protocol
        if differs and _started_later(other, own) and (newer or not own.managed):
            return other
    return None


def _started_later(other: RunningHost, own: RunningHost) -> bool:
    return other.started is not None and own.started is not None and other.started > own.started


# --- text --------------------------------------------------------------------------------------------------


def describe(host: RunningHost) -> str:
    """``onnx-dl 0.3.1, protocol version 6, pid 4711, since 2031-05-06 07:08:09``."""
    package = f"onnx-dl {host.package}" if host.package else "onnx-dl"
    managed = ", managed by onnx-dl supervise" if host.managed else ""
    return f"{package}, {protocol_text(host.protocol)}, pid {host.pid}{_since(host)}{managed}"


def _since(host: RunningHost) -> str:
    with contextlib.suppress(ValueError, OverflowError, OSError):  # the time of a file may be any number
        if host.since is not None:
            return f", since {datetime.datetime.fromtimestamp(round(host.since))}"
    return ""


def protocol_text(protocol: int | None) -> str:
    """``protocol version 5``."""
    return "protocol version 4 or older" if protocol is None else f"protocol version {protocol}"


def outlook(host: RunningHost, hosts: Iterable[RunningHost]) -> str:
    """One sentence on how long a host of another version will run; ``hosts``: all that run."""
    if host.protocol is None:
        return (
            "It ends some time after its last client has gone, unless it holds models itself or is managed: "
            f"onnx-dl stop --host {host.name} --all-versions ends it."
        )
    if successor(host, hosts) is not None:
        return "It ends when its clients have gone."
    return "It stays, as any host does."
