from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_dl.server.http.depth import check_depth, depth
from onnx_dl.server.v2.failures import RequestFailure


def nested(value: object) -> int:
    """The depth of plain data, by recursion."""
    if isinstance(value, dict):
        return 1 + max(map(nested, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(nested, value), default=0)
    return 0


VALUES = st.recursive(
    st.one_of(st.text(alphabet='[]{}"\\a', max_size=8), st.integers(), st.none()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text('[{"\\'), inner, max_size=3)
    ),
    max_leaves=30,
)


@given(VALUES)
def test_the_depth_is_that_of_the_data(value: object) -> None:
    assert depth(json.dumps(value).encode()) == nested(value)


@given(st.binary(max_size=100))
def test_any_bytes_have_some_depth(data: bytes) -> None:
    assert depth(data) >= 0


@pytest.mark.parametrize("levels", [64, 65, 100_000])
def test_json_that_is_nested_too_deeply_is_refused(levels: int) -> None:
    text = b"[" * levels + b"]" * levels
    if levels <= 64:
        check_depth(text, 64)
    else:
        with pytest.raises(RequestFailure, match="nested deeper than 64"):
            check_depth(text, 64)


def test_brackets_in_text_do_not_hide_or_make_depth() -> None:
    check_depth(b'["' + b"[" * 1000 + b'"]', 64)
    with pytest.raises(RequestFailure):
        check_depth(b'["' + b"]" * 1000 + b'",' + b"[" * 80 + b"]" * 81, 64)


def test_many_lists_side_by_side_are_not_deep() -> None:
    check_depth(json.dumps([[1, 2]] * 10_000).encode(), 64)
