"""A demonstration of onnx_dl: small real models with held-out samples, and a large model made on the spot."""
