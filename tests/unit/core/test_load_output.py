"""What is printed and warned of in one process is said in another."""

from __future__ import annotations

import warnings

import pytest

from onnx_dl.core import load_output


def test_they_are_said_again(capsys: pytest.CaptureFixture[str]) -> None:
    with load_output.captured() as heard:
        print("one")
        warnings.warn("two", DeprecationWarning, stacklevel=1)
        print("three")
    assert capsys.readouterr().out == ""
    with pytest.warns(DeprecationWarning, match="two") as caught:
        load_output.repeat(heard)
    assert caught[0].filename == __file__
    assert capsys.readouterr().out == "one\nthree\n"


def test_an_exception_takes_them_along(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="mine") as caught, load_output.captured():
        print("before")
        raise ValueError("mine")
    load_output.repeat(caught.value.remarks)  # type: ignore[attr-defined]
    assert capsys.readouterr().out == "before\n"
    with pytest.raises(ValueError, match="silent") as caught, load_output.captured():
        raise ValueError("silent")
    assert not hasattr(caught.value, "remarks")


@pytest.mark.parametrize(
    "heard", [None, [], "x", [["warning"]], [["unknown", 1]], [["print", 5]], [None], {"a": 1}]
)
def test_what_is_no_remark_is_skipped(heard: object, capsys: pytest.CaptureFixture[str]) -> None:
    load_output.repeat(heard)
    assert capsys.readouterr().out == ""


def test_a_class_that_is_no_warning() -> None:
    with pytest.warns(UserWarning, match="x"):
        load_output.repeat([["warning", "print", "x", "f.py", 1]])
    with pytest.warns(UserWarning, match="y"):
        load_output.repeat([["warning", "Nonsense", "y", "f.py", 1]])
