"""Folders in Triton's layout, configurations, signatures, versions and their proxies: all that is served.

Decisions are pure functions over plain data; :mod:`.repository` owns the state.  Knows no socket, no request
and no protocol's messages.
"""
