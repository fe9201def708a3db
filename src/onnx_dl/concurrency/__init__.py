"""Waits, starts, locks, forks and deadlines of an application's threads, greenlets and coroutines.

Serves all packages above.  Must know nothing of models, messages or processes of ours.
"""
