"""Metrics of the server: Triton's families, and those of its host beside them.

Knows no socket that clients use, and counts nothing itself: that is ``inference.statistics``.
"""
