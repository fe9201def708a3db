"""The same calls to tritonserver and to our server; tritonserver's answers were recorded."""
