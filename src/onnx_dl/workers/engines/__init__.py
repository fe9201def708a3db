"""Engines that run a model in a worker: onnxruntime, onnx-mlir, and a group of either.

Must not know lanes or messages: an engine gets values and returns values.
"""
