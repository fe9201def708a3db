"""``onnx-dl doctor``: collect facts, try what must be tried, judge, report.

Must change nothing on the machine.
"""
