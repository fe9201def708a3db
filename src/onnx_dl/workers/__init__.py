"""What runs in a worker process: one model, its lanes, and the gate that decides when it may end.

Light on purpose: a worker imports numpy, zmq, msgspec and its engine, and nothing else of weight.
"""
