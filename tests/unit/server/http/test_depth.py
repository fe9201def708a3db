from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_dl.server.http.depth import MOST_LISTS, check_json, shape
from onnx_dl.server.v2.bounds import MOST_VALUES
from onnx_dl.server.v2.failures import RequestFailure


def nested(value: object) -> int:
    """The depth of plain data, by recursion."""
    if isinstance(value, dict):
        return 1 + max(map(nested, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(nested, value), default=0)
    return 0


def lists(value: object) -> int:
    """The number of lists and objects in plain data, by recursion."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + sum(map(lists, inner))


VALUES = st.recursive(
    st.one_of(st.text(alphabet='[]{}"\\a', max_size=8), st.integers(), st.none()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text('[{"\\'), inner, max_size=3)
    ),
    max_leaves=30,
)


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@given(value=VALUES)
def test_levels_and_lists_are_those_of_the_data(block: int, value: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onnx_dl.server.http.depth._BLOCK", block)
        assert shape(json.dumps(value).encode()) == (nested(value), lists(value))


@given(st.binary(max_size=100))
def test_any_bytes_have_some_shape(data: bytes) -> None:
    assert min(shape(data)) >= 0


@pytest.mark.parametrize("levels", [64, 65, 100_000])
def test_json_that_is_nested_too_deeply_is_refused(levels: int) -> None:
    text = b"[" * levels + b"]" * levels
    if levels <= 64:
        check_json(text, 64)
    else:
        with pytest.raises(RequestFailure, match="nested deeper than 64"):
            check_json(text, 64)


def test_brackets_in_text_do_not_hide_or_make_depth() -> None:
    check_json(b'["' + b"[" * 1000 + b'"]', 64)
    with pytest.raises(RequestFailure):
        check_json(b'["' + b"]" * 1000 + b'",' + b"[" * 80 + b"]" * 81, 64)


def test_many_lists_side_by_side_are_not_deep() -> None:
    check_json(json.dumps([[1, 2]] * 10_000).encode(), 64)


@pytest.mark.parametrize("item", [b"[],", b"{},", b"[1],"])
def test_too_many_lists_are_refused(item: bytes) -> None:
    check_json(b"[" + item * (MOST_LISTS - 2) + b"[]]", 64)
    with pytest.raises(RequestFailure, match="lists and objects") as caught:
        check_json(b"[" + item * (MOST_LISTS - 1) + b"[]]", 64)
    assert caught.value.http == 413


def test_too_many_values_are_refused() -> None:
    check_json(b"[" + b"1," * MOST_VALUES + b"1]", 64)
    with pytest.raises(RequestFailure, match="values") as caught:
        check_json(b"[" + b"1," * (MOST_VALUES + 1) + b"1]", 64)
    assert caught.value.http == 413
