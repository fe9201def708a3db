"""How threads, greenlets and coroutines of an application wait, start, lock, fork and give up.

Serves all packages above.  Must know nothing of models, messages or processes of ours.
"""
