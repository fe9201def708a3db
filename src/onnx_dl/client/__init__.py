"""The application's side of one supervisor: its connection, models, lanes and calls.

Must know nothing of onnxruntime's face (``session``), nor of the code of supervisor and workers.
"""
