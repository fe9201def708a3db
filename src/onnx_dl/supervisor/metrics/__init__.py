"""Prometheus metrics of a supervisor: counters, families, and the page that serves them.

Must not change what it counts; costs nothing if metrics are off.
"""
