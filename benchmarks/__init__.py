"""What onnx-dl costs and what it gives back, measured beside onnxruntime in the same run."""
