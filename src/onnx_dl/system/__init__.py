"""The machine and this Python: descriptors, limits, installation, and the one way to start our processes.

Must know nothing of models, messages or tensors.  ``boot`` names the entries of processes, and imports none.
"""
