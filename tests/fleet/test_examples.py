# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ansible parses every example of the documentation, and the examples are run on real stores."""

from __future__ import annotations

import itertools
import pathlib
import re
import runpy
import typing as t

import pytest
import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from support import examples
from support.lab import COLLECTION

BLOCKS = examples.blocks()


def group_of(block: examples.Block) -> str:
    """The group with which an example is run: a guide, all texts of roles, or all EXAMPLES of plugins."""
    return block.document if block.document.startswith("docs") else block.document.split("/")[0]


DOCUMENTS = {name: list(found) for name, found in itertools.groupby(BLOCKS, group_of)}
PREFIX = "userns.storage."


@pytest.fixture(scope="module")
def example_host(lab: t.Any) -> t.Iterator[examples.ExampleHost]:
    made = examples.ExampleHost(lab)
    yield made
    made.close()


@pytest.mark.parametrize("document", list(DOCUMENTS))
def test_examples_work(example_host: examples.ExampleHost, document: str) -> None:
    found = DOCUMENTS[document]
    done = example_host.run(found)
    for block in found:
        assert block in done or block.skipped or block.file or block.kind in ("text", "data"), block
    # Each saved file appears in a command, which may be an example that is not run.
    typed = "".join(block.text for block in found if block.kind in ("console", "tasks"))
    for block in found:
        name = pathlib.Path(block.file).name
        assert name in typed or "group_vars" in block.file, block


def test_all_examples_have_valid_syntax(tmp_path: pathlib.Path, collections_path: str) -> None:
    environ = {"ANSIBLE_COLLECTIONS_PATH": collections_path}
    examples.check_syntax(BLOCKS, tmp_path, environ)


def test_few_examples_are_skipped_and_each_has_a_reason() -> None:
    skipped = [block for block in BLOCKS if block.skipped]
    assert all(len(block.skipped.split()) > 2 for block in skipped)
    # The examples of the guide to releases would create a release.
    assert len([block for block in skipped if "releasing" not in block.document]) <= 10


def test_notes_have_a_known_form() -> None:
    for block in BLOCKS:
        assert block.note == "" or block.file or block.skipped or block.fails, block


def specification(kind: str, name: str) -> t.Dict[str, t.Any]:
    """The options of a module, including those of its fragments, or the variables of a role."""
    if kind == "role":
        text = (COLLECTION / f"roles/{name}/meta/argument_specs.yml").read_text()
        options = yaml.safe_load(text)["argument_specs"]["main"]["options"]
    else:
        own = _documentation(COLLECTION / f"plugins/modules/{name}.py")
        options = dict(own.get("options", {}))
        for fragment in own["extends_documentation_fragment"]:
            options.update(_fragment(fragment.removeprefix(PREFIX)).get("options", {}))
    return {key: _plain(option) for key, option in options.items()}


def _documentation(path: pathlib.Path) -> t.Dict[str, t.Any]:
    match = re.search(
        r'DOCUMENTATION = r"""\n(.*?)^ *"""', path.read_text(), re.DOTALL | re.MULTILINE
    )
    assert match
    found: t.Dict[str, t.Any] = yaml.safe_load(match[1])
    return found


def _fragment(name: str) -> t.Dict[str, t.Any]:
    """A documentation fragment, FILE or FILE.PART."""
    file, _dot, part = name.partition(".")
    content = runpy.run_path(str(COLLECTION / f"plugins/doc_fragments/{file}.py"))
    text = getattr(content["ModuleDocFragment"], part.upper() or "DOCUMENTATION")
    found: t.Dict[str, t.Any] = yaml.safe_load(text)
    return found


def _plain(option: t.Mapping[str, t.Any]) -> t.Dict[str, t.Any]:
    keys = ("type", "elements", "choices", "default", "required", "aliases")
    plain = {key: option[key] for key in keys if key in option}
    if "suboptions" in option:
        plain["options"] = {
            key: _plain(suboption) for key, suboption in option["suboptions"].items()
        }
    return plain


def _tasks(data: t.Any) -> t.Iterator[t.Dict[str, t.Any]]:
    for item in data if isinstance(data, list) else []:
        yield item
        for key in ("tasks", "roles", "block"):
            yield from _tasks(item.get(key))


def test_options_and_variables_are_valid() -> None:
    """Examples that are not run are included. Templates are omitted, since their values are unknown here."""
    validated = 0
    for block in BLOCKS:
        if block.language != "yaml":
            continue
        data = block.data
        for task in _tasks(data):
            given = [("module", key, task[key] or {}) for key in task if key.startswith(PREFIX)]
            if str(task.get("role", "")).startswith(PREFIX):
                given.append(("role", task["role"], task.get("vars", {})))
            for kind, name, values in given:
                specs = specification(kind, name.removeprefix(PREFIX))
                plain = {key: value for key, value in values.items() if "{{" not in str(value)}
                for key in set(values) - set(plain):
                    del specs[key]
                errors = ArgumentSpecValidator(specs).validate(plain).error_messages
                assert errors == [], block
                validated += 1
        variables = data if isinstance(data, dict) else {}
        for role in ("prepare", "prune", "report"):
            of_role = {key: value for key, value in variables.items() if key.startswith(f"{role}_")}
            if of_role:
                validator = ArgumentSpecValidator(specification("role", role))
                assert validator.validate(of_role).error_messages == [], block
                validated += 1
    assert validated > 20
