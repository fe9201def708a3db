"""Memory of the engine that an idle worker returns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime

from onnx_dl import InferenceSessionProxy, ModelHost
from tests.support.slow import identity_model


def test_a_profile_has_the_users_runs_only(module_host: ModelHost, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    with InferenceSessionProxy(identity_model(), options, host=module_host) as session:
        session.run(None, {"x": np.ones(1 << 20, np.float32)})
        model = session._handle.in_use()
        assert model is not None
        pool = model.worker.pool  # type: ignore[attr-defined]
        assert [lane for lanes in pool.idle.values() for lane in lanes if lane.is_large]
        pool.tidy(0.0)  # what the connection does every few seconds
        session.run(None, {"x": np.ones(8, np.float32)})  # on the same lane, so after the trim
        events = json.loads(Path(session.end_profiling()).read_text())
    assert [event["name"] for event in events].count("model_run") == 2
