# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the TOML reader: the syntax that storage.conf uses, and the rules of the language."""

from __future__ import annotations

import contextlib
import math
import re
import sys
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import ConfigError
from ansible_collections.userns.storage.plugins.module_utils._storage.store.toml import loads
from hypothesis import given, settings
from hypothesis import strategies as st

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = None

VALID: t.List[t.Tuple[str, t.Any]] = [
    ("", {}),
    ("# only\n\n  # comments", {}),
    ('a = "b"', {"a": "b"}),
    ("a = 'b\\n' # c", {"a": "b\\n"}),
    ('a = "\\t\\u00e4\\U0001F600\\"\\\\"', {"a": '\tä😀"\\'}),
    ("[storage]\r\ndriver = 'vfs'\r\n", {"storage": {"driver": "vfs"}}),
    ("[ a . 'b.c' . \"d\" ]\nx = 1", {"a": {"b.c": {"d": {"x": 1}}}}),
    ("a.b.c = 1\na.b.d = 2", {"a": {"b": {"c": 1, "d": 2}}}),
    ("[a.b]\n[a]\nc = 1", {"a": {"b": {}, "c": 1}}),
    ("x = [\n 'a', # one\n 'b',\n]", {"x": ["a", "b"]}),
    ("x = []", {"x": []}),
    ("x = [[1, 2], ['a'], {y = 1}]", {"x": [[1, 2], ["a"], {"y": 1}]}),
    (
        'pull_options = {enable_partial_images = "false", use_hard_links = "false", ostree_repos=""}',
        {
            "pull_options": {
                "enable_partial_images": "false",
                "use_hard_links": "false",
                "ostree_repos": "",
            }
        },
    ),
    ("a = {}", {"a": {}}),
    ("a = {b.c = 1, b.d = 2}", {"a": {"b": {"c": 1, "d": 2}}}),
    ("a = true\nb = false", {"a": True, "b": False}),
    (
        "a = +1_000\nb = -7\nc = 0xFF\nd = 0o755\ne = 0b11\nf = 0",
        {"a": 1000, "b": -7, "c": 255, "d": 493, "e": 3, "f": 0},
    ),
    ("a = 1.5\nb = 1e3\nc = -2.5E-1\nd = inf", {"a": 1.5, "b": 1000.0, "c": -0.25, "d": float("inf")}),
    ('a = """\nx\n  y\\\n   z"""', {"a": "x\n  yz"}),
    ('a = """"quoted""""', {"a": '"quoted"'}),
    ('a = """a""b"""""', {"a": 'a""b""'}),
    ("a = '''\nx\\\n'y'''''", {"a": "x\\\n'y''"}),
    ("a = ''''x''''", {"a": "'x'"}),
    ("a = ''", {"a": ""}),
    ("[[s]]\nx = 1\n[[s]]\nx = 2\n[s.t]\ny = 3", {"s": [{"x": 1}, {"x": 2, "t": {"y": 3}}]}),
    ("a = 2026-01-02T03:04:05Z\nb = 2026-01-02\nc = 03:04:05", {
        "a": "2026-01-02T03:04:05Z",
        "b": "2026-01-02",
        "c": "03:04:05",
    }),
    ("root-auto-userns-user = 'x'\n1 = 2\n\"\" = 3", {"root-auto-userns-user": "x", "1": 2, "": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), VALID)
def test_valid_text_is_read(text: str, value: t.Any) -> None:
    assert loads(text.encode(), "f") == value
    assert loads(text.replace("\r\n", "\n").replace("\n", "\r\n").encode(), "f") == value


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "a =",
        "a = b",
        "a = 'b",
        'a = "b',
        'a = "b\nc"',
        'a = """b',
        "a = '''b",
        'a = "\\x"',
        'a = "\\uD800"',
        'a = "\\U00110000"',
        "a = 1 b = 2",
        "a = 1\na = 2",
        "a = [1",
        "a = [1 2]",
        "a = {b = 1",
        "a = {b = 1,}",
        "a = {b = 1\n}",
        "a = {b = 1}\n[a]",
        "a = {b = 1}\na.c = 2",
        "[a",
        "[a]\n[a]",
        "[a]\nb = 1\n[a.b]",
        "[a.b]\n[a]\nb.c = 1",
        "a.b = 1\n[a]",
        "[[a]]\n[a]",
        "[a]\n[[a]]",
        "a = [1]\n[[a]]",
        "a = 01",
        "a = 1__0",
        "a = .5",
        "a = 0755",
        "a = True",
        "= 1",
        "a..b = 1",
        "a = 1\x00",
        "# \x00",
        'a = "\x01"',
        "a = 1\rb = 2",
        "a = " + "9" * 5000,
        "a = " + "[" * 5000 + "]" * 5000,
        "a = " + "{a=" * 5000 + "1" + "}" * 5000,
        ".".join("a" * 5000) + " = 1",
        "a = 1979-05-27T07:32:00x",
    ],
)
def test_malformed_text_is_rejected(text: str) -> None:
    with pytest.raises(ConfigError, match=r"/etc/storage\.conf"):
        loads(text.encode(), "/etc/storage.conf")


def test_message_names_the_line() -> None:
    with pytest.raises(ConfigError, match="line 3") as caught:
        loads(b"[storage]\n\ndriver = overlay\n", "/etc/storage.conf")
    assert "quotes" in str(caught.value)
    with pytest.raises(ConfigError, match="UTF-8"):
        loads(b"a = '\xff'", "f")


@given(
    st.one_of(
        st.binary(max_size=100), st.text("[]{}=\"'\\.,#ab1 \n-_:eE+", max_size=60).map(str.encode)
    )
)
def test_any_bytes_are_read_or_rejected(data: bytes) -> None:
    try:
        loads(data, "f")
    except ConfigError as error:
        str(error).encode()


@pytest.mark.parametrize("piece", ["'", '"', "'''", '"""', "\\", "[", "a.", "{", "#", "\n", "='"])
def test_reading_work_is_proportional_to_the_text(
    piece: str, count_calls: t.Callable[[t.Callable[[], t.Any]], int]
) -> None:
    for start in ("", "a = ", "a = '''", 'a = """'):

        def read(count: int, start: str = start) -> None:
            with contextlib.suppress(ConfigError):
                loads((start + piece * count).encode(), "f")

        calls = count_calls(lambda: read(500))
        # With quadratic work, the factor would be 64.
        assert count_calls(lambda: read(4000)) < 12 * calls
        # A regular expression with exponential backtracking would not end here.
        read(200_000)


keys = st.text("abc-_1", min_size=1, max_size=3)
values = st.recursive(
    st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)),
    max_leaves=8,
)


def as_toml(value: t.Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(item):08X}" for item in value) + '"'
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    return "{" + ", ".join(f"{key} = {as_toml(item)}" for key, item in value.items()) + "}"


@given(st.dictionaries(keys, st.dictionaries(keys, values, max_size=3), max_size=3))
def test_tables_are_read_as_they_were_written(tables: t.Dict[str, t.Any]) -> None:
    lines = []
    for name, table in tables.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {as_toml(value)}" for key, value in table.items()]
    assert loads("\n".join(lines).encode(), "f") == tables


# Comparison with tomllib of Python 3.11 and later. With older versions, the same texts are only read.

# Elements of TOML, and invalid elements that are similar to them.
PIECES = (
    *("a", "b", "a.b", '"a"', "'a'", "a . b", '""', "''", "-1", "é"),
    *("=", " = ", ".", ",", " ", "\t", "\n", "\r\n", "\r", "#", "# c\n", "\0", "\x7f", "\ufeff"),
    *("[", "]", "[[", "]]", "{", "}", "[a]", "[a.b]", "[[a]]", "[[a.b]]", "[ a ]", "{ }", "[ ]"),
    *('"', "'", '"""', "'''", '"""a"""', "'''a'''", "\\", "\\n", "\\u00e9", "\\ud800"),
    *("\\U0010FFFF", "\\x41", '\\"', "true", "false", "True", "1", "0", "01", "+1", "-0"),
    *("1_000", "1__0", "_1", "0x1F", "0o17", "0b101", "0xg", "1.5", "1.", ".5", "1e3", "1E-3"),
    *("1.5e+3", "inf", "-inf", "nan", "9223372036854775808", "a = 1\n", 'a = "b"\n'),
    *("b = [1, 2]\n", "b = { a = 1 }\n", "a.b = 1\n", "[a]\nb = 1\n"),
)
# This reader returns dates and times as text.
_DATE = re.compile(r"\d{4}-\d|\d\d:\d")


def same(found: t.Any, expected: t.Any) -> bool:
    """Whether two values and their types are equal. NaN equals NaN."""
    for kind in (dict, list):
        if isinstance(found, kind) != isinstance(expected, kind):
            return False
    if isinstance(found, dict):
        return list(found) == list(expected) and all(
            same(found[key], expected[key]) for key in found
        )
    if isinstance(found, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if type(found) is not type(expected):
        return False
    # NaN is the only value that is not equal to itself.
    return bool(
        found == expected
        or (isinstance(found, float) and math.isnan(found) and math.isnan(expected))
    )


def compare(text: str) -> None:
    """Assert that this reader and tomllib return the same value, or both reject the text."""
    try:
        found: t.Any = loads(text.encode(), "f")
    except ConfigError:
        found = None
    if sys.version_info < (3, 11) or _DATE.search(text):
        return
    try:
        expected: t.Any = tomllib.loads(text)
    except (ValueError, RecursionError):
        expected = None
    assert same(found, expected), (text, found, expected)


@settings(max_examples=1500)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_any_text_is_read_as_by_tomllib(text: str) -> None:
    compare(text)


@settings(max_examples=500)
@given(st.lists(st.tuples(st.sampled_from(PIECES[:10]), st.sampled_from(PIECES)), max_size=5))
def test_any_assignments_are_read_as_by_tomllib(pairs: t.List[t.Tuple[str, str]]) -> None:
    compare("".join(f"{key} = {value}\n" for key, value in pairs))


@pytest.mark.parametrize("text", [text for text, _expected in VALID])
def test_valid_texts_are_read_as_by_tomllib(text: str) -> None:
    compare(text)
