"""A model of the world around the scheduler: clients, workers, a saver, a file, time.

``python -m tests.world --transitions 1000000 --seed 1`` walks through it for as long as one likes;
``tests/unit/supervisor/policy/test_scheduler_world.py`` does a little of the same.  ``--turns 1000`` walks
through what may happen to processes that start early.
"""
