"""Workers whose sessions say that they are on CUDA: see ``sitecustomize.py`` in this folder."""

from __future__ import annotations

import os
from pathlib import Path

from onnx_dl import InferenceSessionProxy, ModelHost
from tests.support import fake_cuda, zoo
from tests.support.fake_cuda import Call

PIN, UNPIN = "cuMemHostRegister_v2", "cuMemHostUnregister"
_HERE = Path(__file__).parent
_NOT_PERMITTED = 800


class Cuda:
    """The driver of these workers, and what they ask of it."""

    def __init__(self, folder: Path) -> None:
        """``folder``: of the test.  Skips the test without a C compiler."""
        self.log = folder / "log"
        folders = [str(_HERE), str(_HERE.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._environment = {
            "PYTHONPATH": os.pathsep.join(folders),
            "LD_LIBRARY_PATH": str(fake_cuda.build(folder).parent),
            "FAKE_CUDA_LOG": str(self.log),
        }

    def proxy(self, host: ModelHost, model: bytes | None = None, **variables: str) -> InferenceSessionProxy:
        """Makes a proxy of a model, y = x + 1 by default."""
        data = zoo.plus(1) if model is None else model
        return InferenceSessionProxy(data, environment=self._environment | variables, host=host)

    def calls(self, function: str) -> list[Call]:
        return [call for call in fake_cuda.calls(self.log) if call.function == function]

    def pinned(self) -> set[int]:
        """Addresses that are pinned now."""
        found: set[int] = set()
        for call in fake_cuda.calls(self.log):
            if call.function == PIN and not call.result:
                found.add(call.address)
            elif call.function == UNPIN and not call.result:
                found.remove(call.address)
        return found

    def wrong(self) -> list[Call]:
        """Calls about pins that a driver does not expect."""
        pins = [call for call in fake_cuda.calls(self.log) if call.function in (PIN, UNPIN)]
        late = [call for call in fake_cuda.calls(self.log) if "after-unmap" in call.function]
        return late + [call for call in pins if call.result not in (0, _NOT_PERMITTED)]
