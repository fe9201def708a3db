"""What is served: folders in Triton's layout, configurations, signatures, versions and their proxies.

Decisions are pure functions over plain data; :mod:`.repository` owns the state.  Knows no socket, no request
and no protocol's messages.
"""
