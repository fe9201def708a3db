"""Objects of onnxruntime as plain data, and back: options, values, metadata, recorded calls.

Starts no process and opens no socket.  Must know nothing of messages or of who uses it.
"""
