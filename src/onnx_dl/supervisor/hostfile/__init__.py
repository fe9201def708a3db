"""``host.toml``: read, checked with line numbers, watched, and applied to a running host.

Must not know how models are loaded; it says what is wanted.
"""
