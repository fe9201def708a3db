"""How packages that know nothing of onnx-dl use it: the patch of onnxruntime, PyInstaller's hook.

Stands on ``session`` and ``host``, as an application does.  Must not reach below them.
"""
