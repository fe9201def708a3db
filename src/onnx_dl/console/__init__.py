"""What ``onnx-dl ps``, ``top``, ``events``, ``load``, ``unload``, ``pin`` and ``doctor`` show and do.

What is shown is made by pure functions of a snapshot, events or findings; who asks a host and who writes to
the terminal is apart from that.  The grammar of the command line is :mod:`onnx_dl.cli`'s.
"""
