"""A user's actions on a host: open models by name, hold them there, connect, warm up.

Stands on ``client`` and ``session``.  Must know nothing of supervisor or workers but by messages.
"""
