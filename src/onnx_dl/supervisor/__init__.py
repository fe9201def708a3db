"""The supervisor process: its loop does all I/O, and carries out what ``policy`` decides.

Never sees a tensor: must not know ``protocol.lane``, nor the code of client and workers.
"""
