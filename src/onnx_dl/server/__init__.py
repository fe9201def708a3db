"""The network server: the Open Inference Protocol over HTTP and gRPC, as a client of a host.

Needs the extra ``serve``.  Only ``cli`` imports it.  docs/architecture.md has the order of its packages.
"""
