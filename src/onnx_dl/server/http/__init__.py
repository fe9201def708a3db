"""HTTP/1.1 of the Open Inference Protocol: connections that read bodies where inferences are made from.

Must not know models, workers, or how an inference is made: it sees a
:class:`~onnx_dl.server.interfaces.Server` only.
"""
