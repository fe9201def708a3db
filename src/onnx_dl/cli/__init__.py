"""The command ``onnx-dl``: a module for each of its commands, and what they print.

Must add nothing that Python code cannot do through the public API.
"""
