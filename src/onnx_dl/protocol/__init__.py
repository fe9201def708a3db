"""Messages that cross a process boundary, as typed structs: who may say what, and exceptions as data.

Must know no socket, no shared memory and no process; ``docs/protocol.md`` describes it.
"""
