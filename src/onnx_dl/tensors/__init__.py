"""Arrays in shared memory: segments, blocks, who may write where, and values to and from the wire.

Must know no socket: descriptors and messages are handed over by ``transport``.
"""
