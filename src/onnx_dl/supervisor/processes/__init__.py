"""Processes that the supervisor starts: template, workers, saver; their descriptors and their end.

Must not know why one is started or ended.
"""
