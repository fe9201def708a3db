"""When workers start and end, and who gets memory: pure decisions.

Facts and times go in, commands come out.  Must know no clock, descriptor, signal or process.
"""
