"""``python -m benchmarks.serving``: ``onnx-dl serve`` beside tritonserver and MLServer, in turns.

All servers are called by the same clients (``client``), and run the same models with onnxruntime.
"""
