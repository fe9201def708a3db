"""Transport of messages, blocks and wake-ups: sockets, lanes, doorbells; and where hosts are found.

Must not know what a client, the supervisor or a worker does with what it carries.
"""
