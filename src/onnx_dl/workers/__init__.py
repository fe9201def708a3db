"""The worker process: one model, a thread for each lane, and the gate that decides when it may end.

Must know nothing of client and supervisor but their messages.
"""
