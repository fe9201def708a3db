"""Every fault of every process of ours in every state of a model, and what its callers may see: a table.

Data only.  :mod:`tests.supervisor.test_matrix` prepares the state, makes the process fail, and compares.
What is not in the table cannot exist, and says why.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

RIGHT, DIED, LATE, PROTOCOL, MEMORY, GONE = "right", "died", "late", "protocol", "memory", "gone"
"""What becomes of a call: its result; WorkerDied; RunTimeout, LoadTimeout or UnloadTimeout at the caller's
own deadline; ProtocolError; MemoryLimitExceeded; SupervisorDied or SupervisorTimeout."""


class Row(NamedTuple):
    """One fault.  Each text names the outcomes that are allowed, with ``|`` between them."""

    caller: dict[str, str]
    """By state: of the call that waits for the process when the fault happens or, where none does, of the
    first one after that.  States that are not named cannot have the fault."""
    why_not: str = ""
    """Why the others cannot."""
    timeout: bool = False
    """Whether callers have a deadline, because nothing else ends their wait."""
    unload: str = RIGHT
    """Of an unload() that waits meanwhile."""
    remedy: dict[str, str] = {}
    """By state: what has to be done before the next call is right; not named: nothing."""


class Cell(NamedTuple):
    """One place of the table."""

    process: str
    fault: str
    state: str
    row: Row

    def __str__(self) -> str:
        return f"{self.process}-{self.fault}-{self.state}".replace(" ", "_")


STATES: Final = {
    # LOADING: the engine is imported, the model is loaded.
    "import": "loading",
    "load": "loading",
    # READY: nothing runs, a session() block holds it, a call runs.
    "idle": "ready",
    "hold": "ready",
    "run": "ready",
    # DRAINING: unload() waits for a call, the worker closes the model.
    "drain": "draining",
    "close": "draining",
    "unloaded": "unloaded",
    "failed": "failed",
}
"""The moments at which a fault happens, and the state of the model's life that each belongs to."""

OF_WORKERS: Final = ("import", "load", "idle", "hold", "run", "drain", "close")
OF_OTHERS: Final = ("unloaded", "load", "idle", "hold", "run", "drain", "close", "failed")
NO_WORKER: Final = "A model that is unloaded or failed has no worker."
NOT_ALONE: Final = "To template and supervisor, the import of an engine is a part of its load."


def _each(outcome: str, *states: str, **others: str) -> dict[str, str]:
    return dict.fromkeys(states or OF_WORKERS, outcome) | others


# A worker that dies between calls is replaced; that it dies in close() ends what was to end.
_DIES = _each(DIED, idle=RIGHT, hold=RIGHT, close=RIGHT)
# A load that SIGKILL ended is made once more: the kernel may have had no memory.
_IS_KILLED = _DIES | {"import": RIGHT, "load": RIGHT}
_NO_LANE: Final = "There is no lane before the model is ready, and none in use when it is closed."
_BETWEEN: Final = "; between calls, no answer is due"
# What an answer that nobody asked for does to the next call, which looks for its own on the same lane.
_UNASKED = _each(PROTOCOL, "idle", "hold", "run", "drain")

# The supervisor ends a worker that says what cannot be; a call that runs may be faster.
_FALLS_OUT = _each(f"{PROTOCOL}|{DIED}|{RIGHT}", idle=RIGHT, hold=RIGHT, close=RIGHT)

WORKER: Final[dict[str, Row]] = {
    "exit": Row(_DIES),
    "SIGSEGV": Row(_DIES),
    "SIGKILL": Row(_IS_KILLED),
    "abort": Row(_DIES),
    "ignores SIGTERM": Row(_each(RIGHT)),
    "hangs": Row(
        # Lanes that are open have threads of their own, and go on.
        _each(LATE, idle=RIGHT, hold=RIGHT),
        timeout=True,
        unload=LATE,
        remedy=_each("force", "import", "load", "run", "drain"),
    ),
    "hangs with the lock": Row(
        _each(LATE),
        timeout=True,
        unload=LATE,
        remedy=_each("force", "import", "load", "idle", "hold", "run", "drain"),
    ),
    "stops": Row(
        _each(LATE),
        timeout=True,
        unload=LATE,
        remedy=_each("force", "import", "load", "idle", "hold", "run", "drain"),
    ),
    "leaks": Row(_each(RIGHT)),
    # Seen during a call that takes a moment, or else after it, when another worker takes its place.
    "takes too much": Row(_each(f"{MEMORY}|{RIGHT}", run=MEMORY, drain=MEMORY, close=RIGHT)),
    "answer twice": Row(
        _UNASKED | {"run": RIGHT, "drain": RIGHT}, _NO_LANE, remedy={"run": "one more", "drain": ""}
    ),
    "answer late": Row(_each(LATE, "run", "drain"), _NO_LANE + _BETWEEN, timeout=True, unload=LATE),
    "answer with another block": Row(_UNASKED, _NO_LANE),
    "answer with another number": Row(_UNASKED, _NO_LANE),
    "answer nonsense": Row(_UNASKED, _NO_LANE),
    "answer in part": Row(_UNASKED, _NO_LANE),
    "answer without a descriptor": Row(_UNASKED, _NO_LANE),
    "fact twice": Row(_FALLS_OUT),
    "fact that cannot be": Row(_FALLS_OUT),
    "fact of another worker": Row(_each(RIGHT)),
    "fact nonsense": Row(_FALLS_OUT),
    "fact in part": Row(_FALLS_OUT),
}
"""Answers go to a caller, facts to the supervisor."""

# Who waits for close() to end has the next load, which is asked of the template and may be told of its end.
_NEVER_NOTICED = _each(RIGHT, *OF_OTHERS, close=f"{RIGHT}|{DIED}")

TEMPLATE: Final[dict[str, Row]] = {
    fault: Row(_NEVER_NOTICED, NOT_ALONE) for fault in ("SIGKILL", "stops", "closes", "hangs")
}
"""What is loaded, or being loaded, goes on; the next load may be told of the template's end."""

# A call that finds its supervisor gone raises; one that comes when that is known starts the next.
_ENDS = _each(GONE, *OF_OTHERS) | _each(f"{GONE}|{RIGHT}", "unloaded", "idle", "hold", "failed")
_IS_MUTE = _each(LATE, *OF_OTHERS, idle=RIGHT, hold=RIGHT, run=RIGHT, drain=RIGHT)

SUPERVISOR: Final[dict[str, Row]] = {
    "SIGKILL": Row(_ENDS, NOT_ALONE, unload=GONE),
    "closes": Row(_ENDS, NOT_ALONE, unload=GONE),
    "stops": Row(_IS_MUTE, NOT_ALONE, timeout=True, unload=LATE, remedy=_each("go on", *OF_OTHERS)),
    "hangs": Row(_IS_MUTE, NOT_ALONE, timeout=True, unload=LATE, remedy=_each("another", *OF_OTHERS)),
}

TABLES: Final = {"worker": WORKER, "template": TEMPLATE, "supervisor": SUPERVISOR}


def cells() -> list[Cell]:
    """All that there are."""
    return [
        Cell(process, fault, state, row)
        for process, table in TABLES.items()
        for fault, row in table.items()
        for state in row.caller
    ]


def left_out() -> dict[tuple[str, str, str], str]:
    """All that there cannot be, with the reason."""
    return {
        (process, fault, state): _reason(process, state, row)
        for process, table in TABLES.items()
        for fault, row in table.items()
        for state in STATES
        if state not in row.caller
    }


def _reason(process: str, state: str, row: Row) -> str:
    return NO_WORKER if process == "worker" and state not in OF_WORKERS else row.why_not


ALWAYS: Final = {
    ("worker", "answer twice", "run"),
    ("worker", "stops", "close"),
    ("worker", "SIGKILL", "load"),
    ("template", "SIGKILL", "idle"),
    ("template", "stops", "run"),
    ("supervisor", "SIGKILL", "run"),
}
"""Cells that are tried each time, because something went wrong there, or they are asked for most."""


def covering(found: Sequence[Cell]) -> list[Cell]:
    """Few that have each fault and each state of each process."""
    chosen = [cell for cell in found if cell[:3] in ALWAYS]
    for process in TABLES:
        seen = Counter(cell.state for cell in chosen if cell.process == process)
        for fault in TABLES[process]:
            options = [cell for cell in found if (cell.process, cell.fault) == (process, fault)]
            if any(cell in chosen for cell in options):
                continue
            best = min(options, key=lambda cell: (seen[cell.state], len(options)))
            seen[best.state] += 1
            chosen.append(best)
        unseen = {cell.state for cell in found if cell.process == process} - set(seen)
        chosen += [next(c for c in found if (c.process, c.state) == (process, s)) for s in sorted(unseen)]
    return chosen


def chosen(found: Iterable[Cell]) -> list[Cell]:
    """Those to be tried: all with MATRIX=full in the environment."""
    found = list(found)
    return found if os.environ.get("MATRIX") == "full" else covering(found)
