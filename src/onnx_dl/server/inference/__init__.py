"""One inference, from a request of either protocol to its response: checks, limits, the run, statistics.

Knows no socket and no message format, and decides nothing about which models are served.
"""
