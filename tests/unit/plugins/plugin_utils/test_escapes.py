# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests that untrusted text remains text in each output language, according to a parser of that language."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import typing as t
from html.parser import HTMLParser
from pathlib import Path

import pyte
import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage import printable as printing
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import StorageError
from ansible_collections.userns.storage.plugins.module_utils._storage.printable import printable
from ansible_collections.userns.storage.plugins.module_utils._storage.service import command
from ansible_collections.userns.storage.plugins.plugin_utils import (
    _escapes,
    _fleet,
    _fleet_markdown,
    _fleet_page,
)
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from support.local_play import run_tasks

ROOT = Path(__file__).resolve().parents[4]

# Texts that are syntax in one of the languages.
HOSTILE = (
    "\x1b[2J\x1b[1;1Hroot | SUCCESS",
    "\x9b31mred\x9c",
    "\x1b]0;title\x07\x1b]8;;http://example.org\x1b\\link",
    "a\rb\nc\x0bd\x0ce\x85f\u2028g\u2029h",
    "\u202egnp.exe\u2066\u2069\u200f\u061c",
    "zero\u200bwidth\u2060\ufeff\u00ad\u180e",
    "\udc9b[31m\ud800",
    "\x00\x7f\x08\x08\x08\x1b(0",
    "<script>alert(1)</script><!--<![CDATA[&lt;&#60;&amp",
    "\"' onload=alert(1) x='",
    "]]></svg></title><style>*{display:none}",
    "|a|b|\n|---|---|",
    "# title\n- list\n1. number\n> quote\n```\nfence",
    "[link](http://example.org) ![image](x) <http://example.org> [a]: b",
    "http://example.org www.example.org someone@example.org @team #12 org/x#3 !4 ~label GH-5 $x$ :tada:",
    "**bold** __bold__ ~~gone~~ `code` ``two`` `",
    "&copy; &#x41; \\*",
    "`",
    "``` ``",
    "\\",
    "\\|",
    "- [ ] task",
    "+",
    "12) number",
    "===",
    "    indented",
    "{{ lookup('pipe', 'id') }}{% raw %}",
)
texts = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(st.characters(exclude_categories=()), max_size=40),
    st.text("|`*_[]()<>#!&\\-+=.1 a~$:@/\n", max_size=20),
    st.lists(st.sampled_from(HOSTILE), max_size=3).map("".join),
)


def examples(function: t.Any) -> t.Any:
    for text in HOSTILE:
        function = example(text)(function)
    return function


@examples
@given(texts)
def test_terminal_shows_a_single_line(text: str) -> None:
    shown = _escapes.terminal(text)
    screen = pyte.Screen(1000, 5)
    stream = pyte.Stream(screen)
    stream.feed("web1 | ")
    stream.feed(shown.encode().decode())
    stream.feed(" <\r\nnext")
    assert shown.isprintable()
    # pyte puts combining marks into the previous cell, and wide characters into two cells.
    assert screen.display[0].rstrip().replace(" ", "")[:4] == "web1"
    assert screen.display[0].rstrip().endswith("<")
    assert screen.display[1].rstrip() == "next"
    assert screen.title == ""
    assert all(cell.fg == "default" for cell in screen.buffer[0].values())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/srv/a b", "/srv/a b"),
        ("/srv/größe/日本", "/srv/größe/日本"),
        ("a\nb\x1b\x9b", "a\\nb\\x1b\\x9b"),
        ("\u202e\u2028\u200b", "\\u202e\\u2028\\u200b"),
        (os.fsdecode(b"/\xff\x80"), "/\\xff\\x80"),
        ("\ud800", "\\ud800"),
        (5, "5"),
    ],
)
def test_invisible_characters_are_escaped(text: t.Any, shown: str) -> None:
    assert printable(text) == shown


@given(
    st.text(st.characters(exclude_categories=()), min_size=50, max_size=3000), st.integers(20, 200)
)
def test_length_of_messages_is_limited(text: str, limit: int) -> None:
    assert len(printable(text, limit)) <= limit


class Reader(HTMLParser):
    """Collects the text, tags, attributes, comments and declarations of a document."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: t.List[t.Any] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: t.Any) -> None:
        self.found.append((tag, attrs))

    def handle_endtag(self, tag: str) -> None:
        self.found.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.found.append(data)

    def handle_decl(self, decl: str) -> None:
        self.found.append(decl)

    handle_pi = unknown_decl = handle_comment


@examples
@given(texts)
def test_html_is_parsed_as_the_text(text: str) -> None:
    reader = Reader()
    reader.feed(f'<p title="{_escapes.html(text)}">{_escapes.html(text)}</p>')
    reader.close()
    assert reader.found == [("p", [("title", printable(text, 5000))]), "p"]
    assert reader.text == printable(text, 5000)


MARKDOWN = MarkdownIt("commonmark", {"linkify": True}).enable(["table", "strikethrough", "linkify"])


def inline(tokens: t.Sequence[t.Any]) -> t.Tuple[str, t.Set[str]]:
    """The text of an inline token, and the types of its children."""
    if not tokens:
        return "", set()
    (token,) = tokens
    text, kinds = "", set()
    for child in token.children or ():
        text += " " if child.type == "softbreak" else child.content
        kinds.add(child.type)
    return text, kinds


def one_line(text: str) -> str:
    return " ".join(printable(text, 5000).split())


@examples
@given(texts)
def test_markdown_is_parsed_as_the_text(text: str) -> None:
    for begin in ("", "# ", "* ", "> "):
        for written in (_escapes.markdown(text), _escapes.markdown_code(text)):
            tokens = MARKDOWN.parse(begin + written)
            found, kinds = inline([token for token in tokens if token.type == "inline"])
            assert kinds <= {"text", "text_special", "code_inline"}
            assert found == one_line(text), written
            outer = {token.type for token in tokens} - {"inline"}
            assert outer <= {
                *("paragraph_open", "paragraph_close", "heading_open", "heading_close"),
                *("bullet_list_open", "bullet_list_close", "list_item_open", "list_item_close"),
                *("blockquote_open", "blockquote_close"),
            } - (set() if begin else {"heading_open", "bullet_list_open", "blockquote_open"})


@examples
@given(texts)
def test_cell_of_a_markdown_table_remains_a_single_cell(text: str) -> None:
    for written in (_escapes.markdown(text, cell=True), _escapes.markdown_code(text, cell=True)):
        table = f"| a | b | c |\n| --- | --- | --- |\n| x | {written} | y |\n\nafter"
        tokens = MARKDOWN.parse(table)
        cells = [
            inline([tokens[location + 1]])
            for location, token in enumerate(tokens)
            if token.type == "td_open"
        ]
        assert [cells[0][0], cells[2][0]] == ["x", "y"]
        assert len(cells) == 3
        assert cells[1][0] == one_line(text), written
        assert cells[1][1] <= {"text", "text_special", "code_inline"}


def test_plain_text_is_unchanged_in_markdown() -> None:
    for text in (
        "node000.example.org",
        "not seen in use for 4 weeks, last on 2026-09-01T12:00:00Z",
        "Failed to connect to the host via ssh: connect to host a port 22: No route to host",
    ):
        assert _escapes.markdown(text) == text


@pytest.mark.parametrize(
    "value", ["", " a", "a ", "a\\", "a\nb", "a\rb", "a\0b", "\udcff", "a\n[Service]\nExecStart=/x"]
)
def test_values_that_units_cannot_contain_are_rejected(value: str) -> None:
    with pytest.raises(ValueError, match="cannot be used in a systemd unit"):
        _escapes.systemd_value(value)


@pytest.mark.parametrize(
    "arguments", [["python3"], ["/a b"], ["/a\\b"], ["-/bin/true"], ["/x", "a\nb"], ["/x", ""]]
)
def test_commands_that_systemd_would_not_run_are_rejected(arguments: t.List[str]) -> None:
    with pytest.raises(ValueError, match="systemd"):
        _escapes.systemd_command(arguments)


# The report: variables with any structure

anything = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.just(10**4000),
        st.floats(),
        texts,
        st.binary(max_size=5),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(
                st.sampled_from(
                    [
                        *(
                            "results",
                            "store",
                            "images",
                            "mapped_layers",
                            "layers",
                            "names",
                            "totals",
                            "mapped",
                        ),
                        *(
                            "removed",
                            "would_free",
                            "notes",
                            "uidmap",
                            "containers",
                            "user",
                            "msg",
                            "driver",
                        ),
                        *(
                            "report_store",
                            "prune_store",
                            "unreachable",
                            "orphans",
                            "action",
                            "reason",
                            "skipped",
                        ),
                    ]
                ),
                st.integers(),
                texts,
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)
GOOD = {
    "report_reached": {"ping": "pong"},
    "report_found": {
        "results": [
            {
                "report_store": "root",
                "store": {"driver": "vfs", "backing_filesystem": "ext4", "graphroot": "/g"},
                "images": [
                    {
                        "id": "b" * 64,
                        "names": ["localhost/good:1"],
                        "layers": [],
                        "mapped_layers": [],
                    }
                ],
                "totals": {"exclusive": 5},
            }
        ]
    },
}


@given(
    st.dictionaries(
        st.sampled_from(
            ["report_reached", "report_found", "report_error", "prune_collected", "prepare_made"]
        ),
        anything,
    )
)
def test_variables_of_one_host_do_not_affect_the_report_on_others(
    variables: t.Dict[str, t.Any],
) -> None:
    facts = {"good": GOOD, "odd": variables}
    fleet = _fleet.fleet(["good", "odd", "absent"], facts)
    states = {host.name: host for host in fleet.hosts}
    assert states["good"].state == _fleet.OK
    assert states["good"].sums.on_disk == 5
    assert states["absent"].state == _fleet.FAILED
    assert isinstance(states["odd"].message, str)
    assert all(isinstance(value, int) for value in _fleet.totals(fleet).values())
    page = _fleet_page.render(fleet, "t", "m")
    page.encode()
    reader = Reader()
    reader.feed(page)
    assert page.count("localhost/good:1") <= 1
    text = _fleet_markdown.render(fleet, "t", "m")
    text.encode()
    rows = [line for line in text.splitlines() if line.startswith("| odd |")]
    assert len(rows) == 1


def test_error_of_a_host_with_malformed_variables_names_the_cause() -> None:
    facts: t.Dict[str, t.Any] = {"a": {"report_found": {"results": 5}}, "b": {"report_found": []}}
    # A structure that contains itself is endless.
    circle: t.Dict[str, t.Any] = {"msg": None}
    circle["msg"] = circle
    facts["c"] = {"report_found": {"results": [circle]}}
    facts["d"] = {"report_found": {"results": [{"store": {}, "msg": [["x"] * 9] * 9}]}}
    facts["e"] = {
        "report_found": {
            "results": [{"store": {"driver": 10**5000}, "totals": {"exclusive": 10**5000}}]
        }
    }
    hosts = {host.name: host.message for host in _fleet.fleet(list(facts), facts).hosts}
    assert hosts["a"] == (
        "The variables of this host cannot be read. results of report_found is of type int, not a list. "
        "Run the role report again."
    )
    assert "report_found is of type list, not a dictionary" in hosts["b"]
    assert hosts["c"] == "(dict)"
    assert hosts["d"] == "(list)"


# Results that are templated again


def test_no_filter_returns_a_template(tmp_path: Path) -> None:
    """Text from a user's store is not evaluated where ansible-core templates a value again."""
    evil = "{{ 6 * 7 }}{{ lookup('ansible.builtin.env', 'HOME') }}"
    reached = {"ping": "pong"}
    store = {"driver": evil, "backing_filesystem": evil, "graphroot": evil}
    image = {"names": [evil], "problem": evil}
    found = {"results": [{"report_store": evil, "store": store, "images": [image]}]}
    data = tmp_path / "data.json"
    data.write_text(json.dumps({"report_reached": reached, "report_found": found, "evil": evil}))
    unit = tmp_path / "a.container"
    unit.write_text(f"[Container]\nImage=localhost/x\nSubUIDMap={evil}\n")
    # Results of modules and files are marked as data.
    load = f"lookup('ansible.builtin.file', '{data}') | from_json"
    policy = "('alice keep_images=' ~ (data.evil | regex_replace(' ', '')))"
    report = "['localhost'] | userns.storage.fleet_report(hostvars, 'markdown')"

    def shown(loop: str) -> t.Dict[str, t.Any]:
        return {"debug": {"msg": "{{ item }}"}, "loop": f"{{{{ {loop} }}}}"}

    tasks: t.List[t.Dict[str, t.Any]] = [
        {"set_fact": {"data": f"{{{{ {load} }}}}"}},
        {"set_fact": {key: f"{{{{ data.{key} }}}}" for key in ("report_reached", "report_found")}},
        {
            "set_stats": {"data": {"stat": "{{ text }}"}, "per_host": False},
            "vars": {"text": f"{{{{ {report} }}}}"},
        },
        shown(f"lookup('ansible.builtin.file', '{unit}') | userns.storage.unit_mapping"),
        shown("data.evil | userns.storage.words"),
        shown(f"{policy} | userns.storage.policies | dict2items"),
        shown("['' | userns.storage.storage_conf({'size': data.evil})]"),
    ]
    environ = {"HOME": str(tmp_path / "seen"), "ANSIBLE_SHOW_CUSTOM_STATS": "1"}
    output = run_tasks(tmp_path, tasks, {**environ, "ANSIBLE_NOCOLOR": "1"})
    assert "6 * 7" in output
    assert "CUSTOM STATS" in output
    assert re.search(r"\b42", output) is None, output
    assert str(tmp_path / "seen") not in output


# Text in units, pages and messages


def test_templates_of_units_escape_every_variable() -> None:
    allowed = re.compile(
        r"\| userns\.storage\.systemd_(value|command) \}\}|\| int \}\}|\{\{ ansible_managed \| comment \}\}"
    )
    found = 0
    for path in (ROOT / "roles").rglob("*.j2"):
        for expression in re.findall(r"\{\{.*?\}\}", path.read_text()):
            found += 1
            assert allowed.search(expression), f"{path.name}: {expression}"
    assert found > 10


def filled(text: str) -> _fleet.Fleet:
    """A fleet in which every text of a host is the given text."""
    copy = _fleet.Copy(text, 1, 2, text, (text, text), text, text)
    image = _fleet.Image(text, (copy,), 1, 2, text)
    store = _fleet.Store(
        user=text,
        problem=text,
        location=text,
        images=[image],
        removals=[_fleet.Removal(text, text, 3, text)],
        prospects=[(text, 1, 2)],
        missing=[_fleet.Missing(text, text, text, 1, refused) for refused in (True, False)],
        notes=[text],
        sums=_fleet.Sums(on_disk=5, recorded=4, mapped_on_disk=2, mapped_recorded=1, missing=2),
    )
    hosts = [
        _fleet.Host(text, state, text, stores, store.sums)
        for state in (_fleet.OK, _fleet.PARTLY, _fleet.UNREACHABLE)
        for stores in ([], [store])
    ]
    return _fleet.Fleet(hosts * 8, [_fleet.FleetImage(text, {text}, 1, 2, 3, 4)], store.sums)


def structure(page: str) -> t.List[t.Any]:
    """The tags, names of attributes, comments and declarations of a page."""
    reader = Reader()
    reader.feed(page)
    reader.close()
    return [
        (item[0], [name for name, _value in item[1]]) if isinstance(item, tuple) else item
        for item in reader.found
    ]


def test_no_text_of_a_host_changes_the_page() -> None:
    """filled() sets all text fields. A new text field must be added to it, otherwise the field is not tested."""
    expected = structure(_fleet_page.render(filled("plain"), "plain", "plain"))
    for text in HOSTILE:
        page = _fleet_page.render(filled(text), text, text)
        assert structure(page) == expected, text
        assert "\x1b" not in page
        page.encode()


def test_no_text_of_a_host_changes_the_markdown() -> None:
    def blocks(text: str) -> t.List[str]:
        return [
            item.type
            for item in MARKDOWN.parse(_fleet_markdown.render(filled(text), text, text))
            if item.type != "inline"
        ]

    expected = blocks("plain")
    assert expected.count("tr_open") > 40
    for text in HOSTILE:
        if text.strip():
            assert blocks(text) == expected, text


def test_messages_cannot_forge_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for text in HOSTILE:
        error = StorageError(text, f"is {text}", f"Look at {text}")
        assert str(error).isprintable()
        command._say(text)
        command._complain(text)
    shown = capsys.readouterr()
    for lines in (shown.out, shown.err):
        assert lines.count("\n") == len(HOSTILE)
        assert lines.replace("\n", "").isprintable()
    assert len(str(StorageError("x" * 10**6, "y" * 10**6, "z" * 10**6))) < 14_000


def test_control_characters_in_results_are_escaped() -> None:
    found = printing.without_controls(
        {"a\x9b": ["\u202e", {"b": (HOSTILE[1], 5, None, True)}], "c": "a\nb"}
    )
    assert found == {
        "a\\x9b": ["\\u202e", {"b": ["\\x9b31mred\\x9c", 5, None, True]}],
        "c": "a\nb",
    }


@examples
@given(texts)
def test_commands_in_messages_can_be_run(text: str) -> None:
    word = text.replace("\0", "")
    try:
        expected = os.fsencode(word)
    except UnicodeEncodeError:
        return
    line = printing.command("printf", "%s", word)
    assert line.isprintable()
    if shutil.which("bash"):
        done = subprocess.run(
            ["bash", "-c", line], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"}
        )
        assert done.stdout == expected
