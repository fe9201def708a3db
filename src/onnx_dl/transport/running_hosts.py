"""Which shared hosts of this user run: of which names and versions, since when, and who follows whom.

A program finds only the host of its own protocol version (:mod:`onnx_dl.transport.rendezvous`).  Those of others are
seen here, for commands that tell of them, and for a host that is to end when one of another version has been
started after it.
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
from onnx_dl.transport.rendezvous import Place, Record, runtime_folder, uptime

_LOCK: Final = re.compile(r"(?P<name>[A-Za-z0-9_.-]{1,64}?)(?:@(?P<protocol>[0-9]{1,9}))?\.lock")


class Sighting(msgspec.Struct, frozen=True, kw_only=True):
    """A host that runs, as others see it."""

    name: str
    protocol: int | None
    """The version that it speaks; None: one before 5, which its record does not say."""
    pid: int
    package: str = ""
    """The version of onnx-dl; empty where the record does not say it."""
    started: float | None = None
    """When, by :func:`~onnx_dl.transport.rendezvous.uptime`; None: it is about to say it."""
    kept: bool = False
    """It was started by ``onnx-dl supervise``."""

    @property
    def reachable(self) -> bool:
        """Whether this version of onnx-dl can ask it for anything."""
        return self.protocol == PROTOCOL_VERSION

    @property
    def since(self) -> float | None:
        """When it was started, as Unix time in seconds."""
        return None if self.started is None else time.time() - (uptime() - self.started)


def running(name: str | None = None, environ: Mapping[str, str] = os.environ) -> list[Sighting]:
    """The hosts that run now, of this name or of all names, in the order of names and versions.

    Not for a host itself: see :meth:`~onnx_dl.transport.rendezvous.Place.holder`.

    Raises:
        PlatformError: there is no folder that is the user's alone.
    """
    places = _places(runtime_folder(environ))
    return _sorted(seen for place in places if name in (None, place.name) for seen in _seen(place))


def of_other_versions(place: Place) -> list[Sighting]:
    """The hosts that have the same name as the one at this place and speak another version.

    A host may ask this, too.  Nothing is found in a folder that has gone.
    """
    others = (p for p in _places(place.folder) if p.name == place.name and p.protocol != place.protocol)
    return _sorted(seen for other in others for seen in _seen(other))


def _places(folder: Path) -> Iterator[Place]:
    with contextlib.suppress(FileNotFoundError):
        for entry in os.listdir(folder):
            if found := _LOCK.fullmatch(entry):
                number = found["protocol"]
                protocol = None if number is None else int(number)
                with contextlib.suppress(ConfigError):  # a file that is none of ours
                    yield Place(found["name"], protocol=protocol, folder=folder)


def _seen(place: Place) -> Iterator[Sighting]:
    with contextlib.suppress(OSError):  # something else has the name of a lock file
        if (pid := place.holder()) is not None:
            record = place.record()
            if record is not None and record.pid == pid:
                yield _sighting(place, record)
            else:  # of an earlier host: this one is about to write its own
                yield Sighting(name=place.name, protocol=place.protocol, pid=pid)


def _sighting(place: Place, record: Record) -> Sighting:
    return Sighting(
        name=place.name,
        protocol=place.protocol,
        pid=record.pid,
        package=record.package,
        started=place.published_at() if place.protocol is None else record.started,
        kept=record.kept,
    )


def _sorted(found: Iterable[Sighting]) -> list[Sighting]:
    return sorted(found, key=lambda seen: (seen.name, seen.protocol or 0))


# --- who follows whom --------------------------------------------------------------------------------------


def follower(place: Place) -> str | None:
    """Why the host at this place, which is this process, is not needed once its clients have gone; None: it
    is."""
    if place.published is None:
        return None
    if (waiting := place.awaited_by()) is not None:
        return f"onnx-dl supervise (pid {waiting}) waits for its name"
    next_one = successor(_sighting(place, place.published), of_other_versions(place))
    return None if next_one is None else f"a host of another version was started after it: {told(next_one)}"


def successor(own: Sighting, others: Iterable[Sighting]) -> Sighting | None:
    """Which of the hosts of the same name is wanted in place of ``own``: one of another version that was
    started later.

    One that is kept leaves for a newer version only.  If it left for any, two that are kept would make room
    for each other for ever, because their keepers start them again.
    """
    for other in others:
        newer = (other.protocol or 0) > (own.protocol or 0)
        differs = other.name == own.name and other.protocol != own.protocol
        if differs and _started_later(other, own) and (newer or not own.kept):
            return other
    return None


def _started_later(other: Sighting, own: Sighting) -> bool:
    return other.started is not None and own.started is not None and other.started > own.started


# --- words -------------------------------------------------------------------------------------------------


def told(seen: Sighting) -> str:
    """``onnx-dl 0.3.1, protocol version 6, pid 4711, since 2031-05-06 07:08:09``."""
    package = f"onnx-dl {seen.package}" if seen.package else "onnx-dl"
    kept = ", kept by onnx-dl supervise" if seen.kept else ""
    return f"{package}, {version(seen.protocol)}, pid {seen.pid}{_since(seen)}{kept}"


def _since(seen: Sighting) -> str:
    with contextlib.suppress(ValueError, OverflowError, OSError):  # a file's time may be anything
        if seen.since is not None:
            return f", since {datetime.datetime.fromtimestamp(round(seen.since))}"
    return ""


def version(protocol: int | None) -> str:
    """``protocol version 5``."""
    return "protocol version 4 or older" if protocol is None else f"protocol version {protocol}"


def outlook(seen: Sighting, hosts: Iterable[Sighting]) -> str:
    """What becomes of one of these hosts, which speaks another version than this program."""
    if seen.protocol is None:
        return (
            "It ends some time after its clients have gone, unless it holds models itself or is kept: "
            f"onnx-dl stop --host {seen.name} --all-versions ends it."
        )
    if successor(seen, hosts) is not None:
        return "It ends when its clients have gone."
    return "It stays as any host does."
