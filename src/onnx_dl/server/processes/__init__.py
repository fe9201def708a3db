"""Processes of one server: a first one that owns what they share, and others that take requests, too.

Must not know what travels over HTTP and gRPC, nor how a model is found or run.
"""
