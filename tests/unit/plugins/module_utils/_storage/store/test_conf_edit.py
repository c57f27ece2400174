# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tests of editing storage.conf: only the given keys change, the rest is kept byte for byte."""

from __future__ import annotations

import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import ConfigError
from ansible_collections.userns.storage.plugins.module_utils._storage.store import toml
from ansible_collections.userns.storage.plugins.module_utils._storage.store.conf_edit import (
    edit,
    says,
    settings,
)
from hypothesis import given
from hypothesis import strategies as st

DISTRIBUTION = """\
# The "container storage" table
[storage]

# Default Storage Driver
driver = "overlay"   # keep me

graphroot = "/var/lib/containers/storage"

[storage.options]
additionalimagestores = [
  "/a", # one
]

[storage.options.overlay]
# mountopt specifies comma separated list of extra mount options
#mountopt = "nodev"

# ignore_chown_errors = "false"
[storage.options.thinpool]
# mountopt = "sample of another table"
"""


def test_key_is_added_below_its_sample() -> None:
    changed = edit(DISTRIBUTION, {"overlay.mountopt": "nodev,metacopy=on"})
    assert changed == DISTRIBUTION.replace(
        '#mountopt = "nodev"\n', '#mountopt = "nodev"\nmountopt = "nodev,metacopy=on"\n'
    )
    assert edit(changed, {"overlay.mountopt": "nodev,metacopy=on"}) == changed


def test_value_is_replaced_in_its_line() -> None:
    assert edit(DISTRIBUTION, {"driver": "btrfs"}) == DISTRIBUTION.replace(
        'driver = "overlay"   # keep me', 'driver = "btrfs"   # keep me'
    )


def test_missing_table_is_added() -> None:
    assert edit("", {"driver": "vfs", "vfs.ignore_chown_errors": "true"}) == (
        '[storage]\ndriver = "vfs"\n\n[storage.options.vfs]\nignore_chown_errors = "true"\n'
    )


def test_line_endings_are_kept() -> None:
    assert edit('[storage]\r\ndriver = "vfs"', {"size": "10G"}) == (
        '[storage]\r\ndriver = "vfs"\r\n\r\n[storage.options]\r\nsize = "10G"\r\n'
    )


@pytest.mark.parametrize(
    ("old", "addition", "new"),
    [
        ("nodev", "+metacopy=on", "nodev,metacopy=on"),
        ("nodev,metacopy=off", "+metacopy=on", "nodev,metacopy=on"),
        ("metacopy=on,nodev", "+metacopy=on", "metacopy=on,nodev"),
        ("nodev", "+nodev", "nodev"),
    ],
)
def test_items_are_added_to_a_list(old: str, addition: str, new: str) -> None:
    text = f'[storage.options.overlay]\nmountopt = "{old}"\n'
    assert edit(text, {"overlay.mountopt": addition}) == text.replace(old, new)


def test_items_are_added_to_the_list_for_all_drivers() -> None:
    text = '[storage.options]\nmountopt = "nodev"\n'
    assert toml.loads(edit(text, {"overlay.mountopt": "+metacopy=on"}).encode(), "")["storage"][
        "options"
    ] == {"mountopt": "nodev", "overlay": {"mountopt": "nodev,metacopy=on"}}


@pytest.mark.parametrize(
    "text",
    [
        'storage.driver = "vfs"\n',
        '[storage]\noptions = {overlay = {mountopt = "nodev"}}\n',
        '[storage.options.overlay]\nmountopt = """\nnodev"""\n',
        "[storage.options]\nsize = '''\n[storage.options.overlay]\n'''\n",
    ],
)
def test_unusual_syntax_is_edited_correctly_or_rejected(text: str) -> None:
    requested = {"overlay.mountopt": "metacopy=on", "driver": "overlay"}
    try:
        changed = edit(text, requested)
    except ConfigError:
        return
    found = toml.loads(changed.encode(), "")["storage"]
    assert found["driver"] == "overlay"
    assert found["options"]["overlay"]["mountopt"] == "metacopy=on"
    assert found["options"].get("size") == toml.loads(text.encode(), "")["storage"].get(
        "options", {}
    ).get("size")


def test_text_that_is_not_toml_is_rejected() -> None:
    with pytest.raises(ConfigError, match="not TOML"):
        edit("driver = vfs\n", {"driver": "vfs"})


_VALUES = st.text(st.characters(exclude_categories=["C"]), max_size=20).filter(
    lambda item: item[:1] != "+"
)
_SETTINGS = st.dictionaries(
    st.sampled_from(["driver", "size", "overlay.mountopt", "overlay.size", "btrfs.min_space"]),
    _VALUES,
)


@given(_SETTINGS)
def test_any_setting_can_be_read_and_other_lines_are_kept(requested: t.Dict[str, str]) -> None:
    changed = edit(DISTRIBUTION, requested)
    rest = iter(changed.splitlines())
    assert all(line in rest for line in DISTRIBUTION.splitlines() if not line.startswith("driver"))
    assert edit(changed, requested) == changed
    found = toml.loads(changed.encode(), "")["storage"]
    for name, value in requested.items():
        table, _dot, key = name.rpartition(".")
        section = found if name == "driver" else found["options"]
        assert (section[table] if table else section)[key] == value


def test_settings_are_lines_or_a_dictionary() -> None:
    assert settings(["overlay.mountopt=nodev,metacopy=on", " size = 1G"]) == {
        "overlay.mountopt": "nodev,metacopy=on",
        "size": "1G",
    }
    assert settings({"driver": "vfs"}) == {"driver": "vfs"}
    with pytest.raises(ValueError, match="is not KEY=VALUE"):
        settings(["overlay"])


LISTS = """\
[storage.options]
additionalimagestores = [ # the shared stores
  "/a", # first ] of them
  '/b[',
] # end
size = "1G"
[storage.options.overlay]
mountopt = "nodev"
"""


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_lists_over_several_lines_are_edited(ending: str) -> None:
    """Most files in public repositories contain such lists."""
    text = LISTS.replace("\n", ending)
    changed = edit(text, {"overlay.mountopt": "+metacopy=on"})
    assert changed == text.replace('"nodev"', '"nodev,metacopy=on"')
    changed = edit(text, {"additionalimagestores": ["/c", "/d]"]})
    assert changed.split(ending)[1] == 'additionalimagestores = ["/c", "/d]"] # end'
    assert edit(changed, {"additionalimagestores": ["/c", "/d]"]}) == changed
    replaced = edit(changed, {"additionalimagestores": ["/e"]})
    assert '= ["/e"] # end' in replaced
    assert 'size = "2G"' in edit(text, {"size": "2G"})


def test_lists_with_append_are_kept_or_replaced() -> None:
    """The syntax of containers/storage 1.63."""
    text = '[storage.options]\nadditionalimagestores = ["/a", {append = true}]\n'
    assert edit(text, {"size": "1G"}).endswith(
        '\nadditionalimagestores = ["/a", {append = true}]\n'
    )
    assert edit(text, {"additionalimagestores": ["/b"]}) == (
        '[storage.options]\nadditionalimagestores = ["/b"]\n'
    )


@pytest.mark.parametrize(
    ("current", "setting", "expected"),
    [
        ("", "+/a", ["/a"]),
        ("", "/a,/b", ["/a", "/b"]),
        ("['/a']", "+/b", ["/a", "/b"]),
        ("['/a']", "+/a", ["/a"]),
        ("['/a']", "/b", ["/b"]),
        ("['/a', '/b/']", "-/b", ["/a"]),
        ("['/a']", "-/a", []),
        ("['/a']", "-/other", ["/a"]),
        ("", "-/a", None),
        ("[\n  '/a', # first\n]", "+/b", ["/a", "/b"]),
    ],
)
def test_paths_are_added_to_and_removed_from_a_list(
    current: str, setting: str, expected: t.Optional[t.List[str]]
) -> None:
    text = "[storage]\ndriver = 'overlay'\n[storage.options]\n"
    text += f"additionalimagestores = {current}\n" if current else ""
    requested = {"additionalimagestores": setting}
    changed = edit(text, requested)
    found = toml.loads(changed.encode(), "x")
    options = t.cast(t.Dict[str, t.Any], found["storage"])["options"]
    assert options.get("additionalimagestores") == expected
    assert edit(changed, requested) == changed
    assert says(found, requested)


def test_inherited_list_is_extended_in_a_file_without_the_list() -> None:
    inherited = toml.loads(b"[storage.options]\nadditionalimagestores = ['/a']\n", "x")
    requested = {"additionalimagestores": "+/b"}
    assert 'additionalimagestores = ["/a", "/b"]' in edit("", requested, "x", inherited)
    assert edit("", {"additionalimagestores": "-/b"}, "x", inherited) == ""
    assert "additionalimagestores = []" in edit(
        "", {"additionalimagestores": "-/a"}, "x", inherited
    )


def test_list_with_an_attribute_is_not_extended() -> None:
    text = "[storage.options]\nadditionalimagestores = ['/a', {append = true}]\n"
    with pytest.raises(ConfigError, match="cannot be edited"):
        edit(text, {"additionalimagestores": "+/b"})
