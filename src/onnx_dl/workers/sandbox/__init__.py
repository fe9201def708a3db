"""Sandbox of a worker whose model is not trusted: rights that it keeps, and how it loses the others.

Must not know engines, lanes or policy.
"""
