"""Fuzzers.  ``python -m tests.fuzz`` sends damaged bytes to every reader of data from a process or a disk.

``python -m tests.fuzz --frames 1000000 --seed 1`` runs for as long as wanted.  Short runs are in
``tests/unit/protocol/test_hostile_bytes.py`` and ``tests/transport/test_hostile_peers.py``.
"""
