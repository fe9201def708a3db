"""Regions of shared memory that clients register, so that tensors need not travel through a socket.

Opens and checks them and counts who uses them.  Knows no protocol, no model and no process but its own.
"""
