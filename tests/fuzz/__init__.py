"""Hostile bytes for everything that reads what another process, or a disk, has written.

``python -m tests.fuzz --frames 1000000 --seed 1`` runs as long as one likes;
``tests/unit/test_hostile_bytes.py`` and ``tests/test_hostile_peers.py`` do a little of the same.
"""
