"""The command ``onnx-dl``: a module for each of its commands, and their output.

Must add nothing that Python code cannot do through the public API.
"""
