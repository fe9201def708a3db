"""Plain data of the Open Inference Protocol (version 2) that HTTP and gRPC share.

Knows no socket, no model and no process.
"""
