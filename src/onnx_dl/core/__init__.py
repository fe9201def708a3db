"""Plain data and rules that every process shares: model specs, terms, settings, events, states.

Holds no thread, descriptor, clock or process.  Must know nothing of ours but ``errors``.
"""
