"""Use of onnx-dl by packages that do not know it: the patch of onnxruntime, PyInstaller's hook.

Stands on ``session`` and ``host``, as an application does.  Must not reach below them.
"""
