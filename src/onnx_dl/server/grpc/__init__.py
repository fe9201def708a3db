"""The Open Inference Protocol over gRPC: messages, calls, streams, health.

Knows no tensor's meaning, no model and no process: bytes become an ``InferRequest``, and an ``InferResponse``
becomes bytes.  All decisions about a request are ``inference``'s.
"""
