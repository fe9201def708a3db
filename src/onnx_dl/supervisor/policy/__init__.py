"""Decisions when workers start and end, and which load gets memory.  Pure.

Facts and times go in, commands come out.  Must know no clock, descriptor, signal or process.
"""
