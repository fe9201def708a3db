"""Lines of keys in TOML texts, in each of the ways in which a key can be written."""

from __future__ import annotations

import pytest

from onnx_dl.supervisor.hostfile.line_numbers import line_of

TEXT = '''\
# a comment with models.vad.ttl = 1
limit = "2GiB"  # [models.vad]

defaults.ttl = "5m"
defaults.options.threads = 1
[models]
[models.vad]
path = """
[models.other]
ttl = 1
"""
ttl = [
  1,  # pin = true
  2,
]
pin = true
options = {threads = 2, config = {"a.b" = "c"}}
  [models."a.b"]
  path = 'x = "y'
  warmup.x.shape = [1]
warmup.y = {shape = [2]}

[[lists]]
key = 1
[models.after]
"ttl" = 3
'''


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ("limit", 2),
        ("defaults", 4),
        ("defaults.ttl", 4),
        ("defaults.options", 5),
        ("defaults.options.threads", 5),
        ("models", 6),
        ("models.vad", 7),
        ("models.vad.path", 8),
        ("models.vad.ttl", 12),
        ("models.vad.pin", 16),
        ("models.vad.options", 17),
        ("models.vad.options.threads", 17),
        ("models.after", 25),
        ("models.after.ttl", 26),
        ("lists", 23),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_lines(keys, line, newline):
    assert line_of(TEXT.replace("\n", newline), keys.split(".")) == line


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (("models", "vad", "options", "config", "a.b"), 17),
        (("models", "a.b"), 18),
        (("models", "a.b", "path"), 19),
        (("models", "a.b", "warmup", "x", "shape"), 20),
        (("models", "a.b", "warmup", "y", "shape"), 21),
    ],
)
def test_names_with_dots(keys, line):
    assert line_of(TEXT, keys) == line


@pytest.mark.parametrize(
    ("keys", "line"),
    [("models.vad.nothing", 7), ("lists.key.more", 24), ("models.none.ttl", 6), ("nothing.at.all", 1)],
)
def test_what_stands_nowhere_is_where_its_surroundings_are(keys, line):
    assert line_of(TEXT, keys.split(".")) == line


def test_an_empty_text():
    assert line_of("", ("a",)) == 1
