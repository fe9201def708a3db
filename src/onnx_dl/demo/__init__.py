"""A demonstration of onnx_dl: small trained models with held-out samples, and a large model that it makes."""
