"""Errors of the core as answers: the client's own mistakes are 4xx, all else is 5xx."""

from __future__ import annotations

import onnxruntime.capi.onnxruntime_pybind11_state as native
import pytest

from onnx_dl import errors
from onnx_dl.protocol import failures as wire
from onnx_dl.server.inference.failures import failure_of
from onnx_dl.server.v2.failures import invalid

NODE = "Non-zero status code returned while running Gather node. Name:'/cuda/g' Status Message: "
GPU = [
    "CUDA failure 700: an illegal memory access was encountered ; GPU=0",
    "CUDNN failure 4: CUDNN_STATUS_INTERNAL_ERROR",
    "CUDNN_FE failure 11: CUDNN_BACKEND_API_FAILED",
    "CUBLAS failure 13: CUBLAS_STATUS_EXECUTION_FAILED",
    "CUDA error cudaErrorIllegalAddress:an illegal memory access",
]
RAISED = [
    (native.InvalidArgument("INVALID_ARGUMENT : bad"), 400, "INVALID_ARGUMENT", "OTHER", None),
    (native.InvalidArgument("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Got invalid dimensions"),
     400, "INVALID_ARGUMENT", "OTHER", None),
    (native.NotImplemented("this type is not there"), 400, "INVALID_ARGUMENT", "OTHER", None),
    (native.Fail(NODE + "indices element out of data bounds"), 400, "INVALID_ARGUMENT", "OTHER", None),
    (native.RuntimeException(NODE + "/ort/providers/cuda/math.cc: bad shape"), 400, "INVALID_ARGUMENT",
     "OTHER", None),
    (native.Fail("a stream was gone"), 500, "INTERNAL", "BACKEND", None),
    (native.RuntimeException("a stream was gone"), 500, "INTERNAL", "BACKEND", None),
    *((native.Fail(NODE + text), 500, "INTERNAL", "BACKEND", None) for text in GPU),
    (native.InvalidArgument(GPU[0]), 500, "INTERNAL", "BACKEND", None),
    (native.EPFail(NODE + GPU[0]), 500, "INTERNAL", "BACKEND", None),
    (native.EPFail("no such provider"), 503, "UNAVAILABLE", "BACKEND", 1.0),
    (native.RuntimeException(NODE + "CUDA failure 2: out of memory ; GPU=0"), 503, "UNAVAILABLE", "BACKEND",
     1.0),
    (native.RuntimeException(NODE + "Available memory of 5 is smaller than requested bytes of 9"), 503,
     "UNAVAILABLE", "BACKEND", 1.0),
    (native.RuntimeException("Failed to allocate memory for requested buffer"), 503, "UNAVAILABLE",
     "BACKEND", 1.0),
    (native.NoSuchFile("gone"), 503, "UNAVAILABLE", "BACKEND", 1.0),
    (native.InvalidProtobuf("no model"), 503, "UNAVAILABLE", "BACKEND", 1.0),
    (ValueError("Required inputs (['x']) are missing from input feed ([])."), 400, "INVALID_ARGUMENT",
     "OTHER", None),
    (ValueError("Model requires 2 inputs. Input Feed contains 1"), 400, "INVALID_ARGUMENT", "OTHER", None),
    *((kind("ours"), 500, "INTERNAL", "BACKEND", None)
      for kind in (RuntimeError, ValueError, TypeError, AttributeError, AssertionError)),
    (errors.WorkerDied("died", signal=11), 500, "INTERNAL", "BACKEND", None),
    (errors.MemoryLimitExceeded("too much", retry_after=2.5), 503, "UNAVAILABLE", "BACKEND", 2.5),
    (errors.CapacityError("no room"), 503, "UNAVAILABLE", "BACKEND", 1.0),
    (errors.LoadTimeout("slow", retry_after=4.0), 503, "UNAVAILABLE", "BACKEND", 4.0),
    (errors.SharedMemoryError("full"), 503, "UNAVAILABLE", "BACKEND", 1.0),
    (errors.SupervisorDied("died"), 500, "INTERNAL", "BACKEND", None),
    (errors.HostClosing("closing"), 503, "UNAVAILABLE", "BACKEND", 1.0),
    (errors.DescriptorsExhausted("none left"), 503, "UNAVAILABLE", "BACKEND", 1.0),
    (errors.ModelDigestMismatch("other"), 503, "UNAVAILABLE", "BACKEND", 1.0),
    (errors.ConfigError("wrong"), 503, "UNAVAILABLE", "BACKEND", 1.0),
    (errors.ForeignMemoryError("truncated"), 400, "INVALID_ARGUMENT", "OTHER", None),
    (errors.ProtocolError("broken"), 500, "INTERNAL", "BACKEND", None),
    (KeyError("ours"), 500, "INTERNAL", "BACKEND", None),
]  # fmt: skip


@pytest.mark.parametrize(("error", "http", "grpc", "reason", "retry_after"), RAISED)
def test_an_error_of_a_run(
    error: Exception, http: int, grpc: str, reason: str, retry_after: float | None
) -> None:
    failure = failure_of(error, "m")
    assert (failure.http, failure.grpc, failure.reason) == (http, grpc, reason)
    assert failure.retry_after == retry_after
    assert "'m'" in str(failure) or isinstance(error, errors.ForeignMemoryError)
    # Of the server's own faults nothing is told but the class.
    is_own = failure.http == 500 and type(error).__module__ == "builtins"
    assert (
        str(failure) == f"model 'm' failed: {type(error).__name__}" if is_own else str(error) in str(failure)
    )


@pytest.mark.parametrize(
    ("error", "lines"),
    [(native.Fail(NODE + "CUDA failure 700: no"), 1), (TypeError("ours"), 1), (native.Fail(NODE + "no"), 0)],
)
def test_the_log_tells_of_faults_of_ours(
    error: Exception, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    failure_of(error, "m")
    assert len(caplog.records) == lines


@pytest.mark.parametrize(
    "error", [native.Fail("no such operator"), errors.WorkerDied("died"), RuntimeError("bad"), KeyError("x")]
)
def test_an_error_of_a_load_is_ours(error: Exception) -> None:
    failure = failure_of(error, "m", is_loading=True)
    assert (failure.http, failure.grpc) == (503, "UNAVAILABLE")
    assert str(failure).startswith("failed to load 'm': ")
    assert failure.retry_after == 1.0


def test_a_failure_stays_what_it_is() -> None:
    failure = invalid("no")
    assert failure_of(failure, "m") is failure
    assert failure_of(failure, "m", is_loading=True) is failure


def test_errors_of_onnxruntime_are_known_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's process never imports it: its classes arrive as RemoteError."""
    monkeypatch.setattr(wire, "_keeps_engine_out", False)
    wire.keep_engine_out()
    for error, http in ((native.InvalidArgument("bad input"), 400), (native.NoSuchFile("gone"), 503)):
        arrived = wire.rebuild(wire.describe(error))
        assert type(arrived) is errors.RemoteError
        failure = failure_of(arrived, "m")
        assert failure.http == http
        assert str(failure).endswith(f": {error}")
    assert type(wire.rebuild(wire.describe(ValueError("x")))) is ValueError


def test_other_remote_errors_are_ours() -> None:
    assert failure_of(errors.RemoteError("numpy.Odd: x", type_name="numpy.Odd"), "m").http == 500
