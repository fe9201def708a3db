"""How long a worker's idle threads spin: bounded where the user left it open, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from onnx_dl.core.spec import ModelSpec
from onnx_dl.workers.engines import ort_session
from onnx_dl.workers.engines.thread_spinning import DURATION, spin_entries
from tests.support.small import plus

INTRA, INTER = "session.intra_op.spin_duration_us", "session.inter_op.spin_duration_us"
BOUND = str(DURATION)


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ({}, {INTRA: BOUND, INTER: BOUND}),
        ({"session.disable_prepacking": "1"}, {INTRA: BOUND, INTER: BOUND}),
        ({"session.intra_op.allow_spinning": "1"}, {INTER: BOUND}),
        ({"session.intra_op.allow_spinning": "0"}, {INTER: BOUND}),
        ({INTRA: "5000", "session.inter_op.allow_spinning": "0"}, {}),
        ({"session.intra_op.spin_backoff_max": "8"}, {INTRA: BOUND, INTER: BOUND}),
    ],
)
def test_what_the_user_chose_stays(given: dict[str, str], added: dict[str, str]) -> None:
    assert spin_entries(given) == added


def spec(folder: Path, **fields: Any) -> ModelSpec:
    path = folder / "plus.onnx"
    path.write_bytes(plus(1))
    how = {"providers": ["CPUExecutionProvider"], "options": None, **fields}
    return ModelSpec(key="k", name="plus", cwd="/", path=str(path), **how)


@pytest.mark.parametrize("given", [None, {"config": {"session.intra_op.spin_backoff_max": "2"}}])
def test_a_worker_bounds_spinning_and_does_not_describe_it(
    tmp_path: Path, given: dict[str, Any] | None
) -> None:
    loaded = ort_session.LoadedSession(spec(tmp_path, options=given), None)
    options = loaded.session.get_session_options()
    assert [options.get_session_config_entry(key) for key in (INTRA, INTER)] == [BOUND, BOUND]
    assert ort_session.describe(loaded).options["config"] == (given or {}).get("config", {})


def test_a_model_in_the_applications_process_spins_as_its_other_sessions(tmp_path: Path) -> None:
    options = ort_session.LoadedSession(spec(tmp_path, isolation=False), None).session.get_session_options()
    with pytest.raises(RuntimeError, match="does not have configuration"):
        options.get_session_config_entry(INTRA)
