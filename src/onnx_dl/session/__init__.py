"""Objects that a user holds: faces of onnxruntime and onnx-mlir on a model in a worker.

Turns arguments and values into calls of ``client``.  Must not know hosts, which stand above it.
"""
