"""Python imports this at the start of each process that has this folder in PYTHONPATH.

There, each session says that it has the CUDA provider, so that what is decided for such sessions can be
tested without a GPU.  It still runs on the CPU.  With ``PRETENDED_REFUSAL`` in the environment, no session is
made of a model in a folder of this name; with ``PRETENDED_REMOVAL``, the folder is gone then.
"""

import os
import shutil
import sys
from importlib.machinery import PathFinder

_MODULE = "onnxruntime.capi.onnxruntime_inference_collection"


class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != _MODULE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            _patch(module.InferenceSession)

        spec.loader.exec_module = exec_module
        return spec


def _patch(session):
    make, providers = session.__init__, session.get_providers

    def init(self, model, *args, **kwargs):
        refused = os.environ.get("PRETENDED_REFUSAL")
        if refused and refused in str(model).split(os.sep):
            if "PRETENDED_REMOVAL" in os.environ:
                shutil.rmtree(os.path.dirname(model))
            raise RuntimeError("CUDA failure 2: out of memory")
        make(self, model, *args, **kwargs)

    session.__init__ = init
    session.get_providers = lambda self: ["CUDAExecutionProvider", *providers(self)]


sys.meta_path.insert(0, _Finder)
