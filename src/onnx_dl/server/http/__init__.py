"""HTTP/1.1 of the Open Inference Protocol: a listener whose connections read bodies into memory of the inference.

Must not know models, workers, or how an inference is made: it sees a
:class:`~onnx_dl.server.interfaces.Server` only.
"""
