"""``python -m benchmarks.gpu``: onnx-dl beside onnxruntime in-process, both on one NVIDIA GPU."""
