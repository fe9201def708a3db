"""When it is said that models only push each other out."""

from __future__ import annotations

from onnx_dl.supervisor.policy.announcements import ReloadWatch


def reload(thrash: ReloadWatch, key: str, since: float, now: float) -> str | None:
    thrash.evicted(key)
    return thrash.loaded(key, f"{key}.onnx", since, now)


def test_a_first_load_is_none_and_one_reload_is_not_many() -> None:
    thrash = ReloadWatch()
    assert thrash.loaded("a", "a.onnx", 0.0, 29.0) is None
    assert reload(thrash, "a", 29.0, 30.0) is None
    assert thrash.loaded("a", "a.onnx", 31.0, 60.0) is None  # its TTL ran out: nobody made it go


def test_more_than_a_tenth_of_the_time() -> None:
    thrash = ReloadWatch()
    for at in (10, 11, 12):
        assert reload(thrash, "ab"[at % 2], at, at + 1.0) is None
    told = reload(thrash, "b", 20.0, 20.5)
    assert told is not None
    assert told.startswith(
        "a.onnx, b.onnx were evicted for other models and loaded again 4 times within 30 s, which took 12% of"
    )
    assert "raise memory_limit" in told


def test_once_in_a_window() -> None:
    thrash = ReloadWatch()
    told = [at for at in range(100, 200) if reload(thrash, "a", at, at + 0.5)]
    assert told == [106, 136, 166, 196]


def test_waits_at_the_same_time_count_once() -> None:
    thrash = ReloadWatch()
    for key in "abcdefgh":
        assert reload(thrash, key, 10.0, 12.9) is None
    assert reload(thrash, "i", 12.9, 13.1) is not None


def test_what_is_long_ago_counts_no_more() -> None:
    thrash = ReloadWatch()
    for at in range(0, 1000, 20):
        assert reload(thrash, "a", at, at + 1.4) is None


def test_of_a_long_wait_only_what_lies_within_the_window() -> None:
    told = reload(ReloadWatch(), "a", 0.0, 100.0)
    assert told is not None and "took 100% of that time" in told


def test_what_is_remembered_of_evicted_models_is_bounded() -> None:
    thrash = ReloadWatch()
    for i in range(5000):
        thrash.evicted(str(i))
    assert thrash.loaded("0", "0.onnx", 0.0, 20.0) is None
    assert thrash.loaded("4999", "4999.onnx", 0.0, 20.0) is not None
