# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests that everything that names options agrees with the tables of options. Failures list the missing parts.

The tables are ``Policy``, ``StoreRequest`` and ``MappingOptions`` in ``plugins/module_utils/_storage/operations``.
Argument specs, the settings of the service, the action plugin and the prediction of what each rule would free are
generated from them. Documentation, roles, the survey and the predicates are compared with them.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pathlib
import typing as t

import pytest
import yaml
from ansible_collections.userns.storage.plugins.action.layer_gc import Collected
from ansible_collections.userns.storage.plugins.doc_fragments import _mapping, _store
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import (
    gc_plan,
    gc_policy,
    mapping_options,
    store_opening,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.gc_policy import (
    GcOption,
    Policy,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.options import (
    Option,
    as_option,
    options_of,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.service.settings import load

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODULES = "ansible_collections.userns.storage.plugins.modules."
Json = t.Dict[str, t.Any]
Options = t.Mapping[str, Option]


def missing(path: str, message: str) -> str:
    return f"{path}: {message}"


def read(path: str) -> t.Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def undocumented(path: str, documented: t.Mapping[str, Json], options: Options) -> t.Iterator[str]:
    """Report options that are not documented, or not as in the table."""
    for name, option in options.items():
        entry = option.argument()
        if name not in documented:
            yield missing(path, f"document the option {name}: {json.dumps(entry)}")
            continue
        for key in ("type", "elements", "default", "choices"):
            found, expected = documented[name].get(key), entry.get(key)
            if found != expected:
                yield missing(path, f"{name}: {key} is {found!r}, the table has {expected!r}")


# Consumers of the table of layer_gc


def module_documentation() -> t.Iterator[str]:
    documented = yaml.safe_load(importlib.import_module(MODULES + "layer_gc").DOCUMENTATION)
    path = "plugins/modules/layer_gc.py"
    yield from undocumented(path, documented["options"], gc_policy.OPTIONS)
    for name in sorted({*documented["options"]} - {*gc_policy.OPTIONS, "time_limit"}):
        yield missing(path, f"{name} is documented, but not in the table: remove it")


def uses_answer_filter(option: Option) -> bool:
    """Whether the role accepts any type from a survey or an inventory, and converts it with the filter answer."""
    return not option.choices and option.type != "list" and option.default not in (True, False)


def role_specs() -> t.Iterator[str]:
    path = "roles/prune/meta/argument_specs.yml"
    specs = read(path)["argument_specs"]["main"]["options"]
    defaults = read("roles/prune/defaults/main.yml")
    for name, option in gc_policy.OPTIONS.items():
        variable = f"prune_{name}"
        default = "" if option.default is None else option.argument()["default"]
        kind = "raw" if uses_answer_filter(option) or option.type == "list" else option.type
        expected = {"type": kind, "default": default}
        if option.choices:
            expected["choices"] = list(option.choices)
        if variable not in specs:
            yield missing(path, f"add {variable}: {json.dumps(expected)}")
        else:
            found = {key: value for key, value in specs[variable].items() if key != "description"}
            if found != expected:
                yield missing(path, f"{variable} is {found}, the table has {expected}")
            if f"O(userns.storage.layer_gc#module:{name})" not in str(specs[variable]):
                yield missing(path, f"{variable} does not refer to the option of layer_gc")
        if defaults.get(variable, None) != default or variable not in defaults:
            yield missing("roles/prune/defaults/main.yml", f"add {variable}: {json.dumps(default)}")


def role_tasks() -> t.Iterator[str]:
    path = "roles/prune/vars/main.yml"
    variables = read(path)
    arguments = read("roles/prune/tasks/collect.yml")[0]["userns.storage.layer_gc"]
    for name, option in gc_policy.OPTIONS.items():
        read_as = " | userns.storage.answer" if uses_answer_filter(option) else ""
        expected = f"{{{{ prune_{name}{read_as} }}}}"
        if variables["prune_policy_of_all"].get(name) != expected:
            yield missing(path, f'add to prune_policy_of_all: {name}: "{expected}"')
        if name not in arguments:
            yield missing("roles/prune/tasks/collect.yml", f"pass {name} of prune_policy")
        if option.type in ("list", "bool"):
            if f"'{name}'" not in variables["prune_service_texts"]:
                yield missing(path, f"exclude {name} from prune_service_texts")
            if not option.of_one_run and f"'{name}':" not in variables["prune_service_policy"]:
                yield missing(path, f"convert {name} in prune_service_policy")


def survey() -> t.Iterator[str]:
    path = "awx/surveys/prune.json"
    questions = {item["variable"]: item for item in read(path)["spec"]}
    for name, option in gc_policy.OPTIONS.items():
        variable = f"prune_{name}"
        if option.in_survey and variable not in questions:
            yield missing(path, f"add a question for {variable}")
        elif variable in questions and not option.in_survey:
            yield missing(path, f"{variable} is in the survey, set in_survey in gc_policy.py")
        elif option.in_survey and option.choices != tuple(questions[variable].get("choices", ())):
            yield missing(path, f"{variable}: its choices are {list(option.choices)}")


def predicates() -> t.Iterator[str]:
    path = "plugins/module_utils/_storage/operations/gc_plan.py"
    tables = (gc_plan.LAYER_RULES, gc_plan.IMAGE_RULES, gc_plan.SPACE_RULES)
    known = [name for table in tables for name in table]
    for name in gc_policy.named(gc_policy.RULE):
        if known.count(name) != 1:
            yield missing(
                path, f"add a predicate for {name} to one of LAYER_RULES, IMAGE_RULES, SPACE_RULES"
            )
    for name in sorted({*known} - {*gc_policy.named(gc_policy.RULE)}):
        yield missing(path, f"{name} has a predicate, but is not a rule in the table")


def guide() -> t.Iterator[str]:
    path = "docs/docsite/rst/gc_policies.rst"
    text = (ROOT / path).read_text(encoding="utf-8")
    for name in gc_policy.named(gc_policy.RULE, gc_policy.PART, gc_policy.LIMIT, gc_policy.IMAGE):
        if not gc_policy.OPTIONS[name].of_one_run and f"``{name}``" not in text:
            yield missing(path, f"describe {name}")


def table() -> t.Iterator[str]:
    path = "plugins/module_utils/_storage/operations/gc_policy.py"
    fields = {field.name for field in dataclasses.fields(gc_policy.Policy)}
    for name, option in gc_policy.OPTIONS.items():
        if option.field not in fields:
            yield missing(path, f"{name} has no field in Policy")
        pair = gc_policy.OPTIONS.get(option.pair)
        if option.pair and (pair is None or pair.kind != gc_policy.PART):
            yield missing(path, f"{name}: its pair {option.pair} is not a part")
        if pair is not None and len(pair.trials) != len(option.trials):
            yield missing(path, f"{name} and {option.pair} have different numbers of trials")
        # All rules predict what they would free, except the rule that lists the layers itself.
        if option.kind == gc_policy.RULE and not option.trials and not option.of_one_run:
            yield missing(path, f"{name} needs values for would_free (trials)")


GC = (module_documentation, role_specs, role_tasks, survey, predicates, guide, table)


@pytest.mark.parametrize("check", GC)
def test_layer_gc_follows_its_table(check: t.Callable[[], t.Iterator[str]]) -> None:
    assert not list(check())


# The tables of the other options


def store_documentation() -> t.Iterator[str]:
    documented = yaml.safe_load(_store.ModuleDocFragment.DOCUMENTATION)["options"]
    path = "plugins/doc_fragments/_store.py"
    yield from undocumented(path, documented, store_opening.STORE_OPTIONS)
    for name in sorted({*documented} - {*store_opening.STORE_OPTIONS, "user", "users"}):
        yield missing(path, f"{name} is documented, but not in the table: remove it")


def service_documentation() -> t.Iterator[str]:
    path = "docs/ready.md"
    text = (ROOT / path).read_text(encoding="utf-8")
    for name in store_opening.STORE_OPTIONS:
        if f"`{name}`" not in text:
            yield missing(path, f"list the key {name} of an entry in the configuration")


def mapping_documentation() -> t.Iterator[str]:
    path = "plugins/doc_fragments/_mapping.py"
    fragment = _mapping.ModuleDocFragment
    for documented in (
        yaml.safe_load(fragment.DOCUMENTATION)["options"]["mappings"]["suboptions"],
        yaml.safe_load(fragment.SINGLE)["options"],
    ):
        yield from undocumented(path, documented, mapping_options.OPTIONS)
        for name in sorted({*documented} - {*mapping_options.OPTIONS}):
            yield missing(path, f"{name} is documented, but not in the table: remove it")


def mapping_texts() -> t.Iterator[str]:
    path = "plugins/filter/mappings.py"
    text = (ROOT / path).read_text(encoding="utf-8")
    for name in sorted({*mapping_options.OPTIONS} - {"userns", "uidmap", "gidmap"}):
        if f"V({name}=" not in text:
            yield missing(path, f"document that {name}=VALUE can follow a mapping")


@pytest.mark.parametrize(
    "check", [store_documentation, service_documentation, mapping_documentation, mapping_texts]
)
def test_documentation_follows_the_tables(check: t.Callable[[], t.Iterator[str]]) -> None:
    assert not list(check())


class Called(Exception):
    """Raised with the arguments of AnsibleModule."""

    def __init__(self, **arguments: t.Any) -> None:
        super().__init__()
        self.arguments = arguments


def argument_spec(monkeypatch: pytest.MonkeyPatch, name: str) -> Json:
    module = importlib.import_module(MODULES + name)

    def called(**arguments: t.Any) -> t.NoReturn:
        raise Called(**arguments)

    monkeypatch.setattr(module, "AnsibleModule", called)
    with pytest.raises(Called) as caught:
        module.main()
    return caught.value.arguments


@pytest.mark.parametrize(
    "name", ["image_layers", "image_layers_info", "layer_gc", "layer_template"]
)
def test_modules_accept_all_options_of_a_store(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    spec = argument_spec(monkeypatch, name)["argument_spec"]
    for option, entry in store_opening.STORE_OPTIONS.items():
        assert spec[option] == entry.argument()
    assert spec["user"] == {"type": "str"}


@pytest.mark.parametrize("name", ["layer_template", "shared_images"])
def test_modules_accept_all_options_of_a_mapping(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    spec = argument_spec(monkeypatch, name)["argument_spec"]
    expected = {option: entry.argument() for option, entry in mapping_options.OPTIONS.items()}
    assert spec["mappings"]["options"] == expected


# Effects of a new entry

# Declared as described in CONTRIBUTING.
NEW_RULE = GcOption("int", trials=(5,), in_survey=True)


@pytest.fixture
def new_rule(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a rule, ``least_files``, which is added to the table only."""

    @dataclasses.dataclass(frozen=True)
    class Extended(Policy):
        least_files: t.Optional[int] = dataclasses.field(default=None, metadata=as_option(NEW_RULE))

    monkeypatch.setattr(gc_policy, "Policy", Extended)
    monkeypatch.setitem(
        gc_policy.OPTIONS, "least_files", options_of(Extended, GcOption)["least_files"]
    )
    return "least_files"


def test_consumers_follow_a_new_rule(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, new_rule: str
) -> None:
    assert argument_spec(monkeypatch, "layer_gc")["argument_spec"][new_rule] == {"type": "int"}

    collected = Collected()
    collected.result = {"kept": [{"id": "a", "rule": "time_limit"}]}
    assert collected.following({new_rule: 3, "origin": "ours"}) == {
        "origin": "ours",
        "layers": ["a"],
    }

    path = tmp_path / "service.json"
    path.write_text(json.dumps({"stores": [{"policy": {new_rule: 3}}]}))
    (store,) = load(str(path))
    assert store.policy is not None
    assert store.policy.options == {new_rule: 3}

    policy = gc_policy.read({new_rule: 3}, 0.0)
    assert getattr(policy, new_rule) == 3
    assert policy.has_rule
    assert not gc_policy.read({}, 0.0).has_rule

    # With a predicate, the rule selects layers, and a run without rules reports what it would free.
    monkeypatch.setitem(
        t.cast(Json, gc_plan.LAYER_RULES),
        new_rule,
        lambda planner, candidate: (
            "it has few files"
            if candidate.inodes < (getattr(planner.policy, new_rule) or 0)
            else ""
        ),
    )
    layers = [gc_plan.Candidate(f"{inodes:064x}", inodes=inodes, created=2e9) for inodes in (2, 9)]
    watch, disk = gc_plan.Watch(), gc_plan.Disk(100, 50)
    plan = gc_plan.plan(layers, (), gc_policy.read({new_rule: 3}, 3e9), disk, watch, 3e9)
    assert [(item.layer_id, item.rule) for item in plan.removals] == [(f"{2:064x}", new_rule)]
    found = gc_plan.prospects(layers, gc_policy.read({}, 3e9), disk, watch, 3e9)
    assert [item for item in found if item.rule == new_rule] == [
        gc_plan.Prospect(new_rule, 5, 1, 0, 2)
    ]


def test_checks_report_missing_parts_of_a_new_rule(new_rule: str) -> None:
    messages = [message for check in GC for message in check()]
    assert all(new_rule in message for message in messages)
    assert [message.partition(":")[0] for message in messages] == [
        "plugins/modules/layer_gc.py",
        "roles/prune/meta/argument_specs.yml",
        "roles/prune/defaults/main.yml",
        "roles/prune/vars/main.yml",
        "roles/prune/tasks/collect.yml",
        "awx/surveys/prune.json",
        "plugins/module_utils/_storage/operations/gc_plan.py",
        "docs/docsite/rst/gc_policies.rst",
    ]
    assert messages[0].endswith('document the option least_files: {"type": "int"}')
    assert messages[1].endswith('add prune_least_files: {"type": "raw", "default": ""}')


@pytest.mark.parametrize(
    ("options", "check", "paths"),
    [
        (store_opening.STORE_OPTIONS, store_documentation, ["plugins/doc_fragments/_store.py"]),
        (store_opening.STORE_OPTIONS, service_documentation, ["docs/ready.md"]),
        (
            mapping_options.OPTIONS,
            mapping_documentation,
            ["plugins/doc_fragments/_mapping.py"] * 2,
        ),
        (mapping_options.OPTIONS, mapping_texts, ["plugins/filter/mappings.py"]),
    ],
)
def test_checks_report_missing_parts_of_a_new_option(
    monkeypatch: pytest.MonkeyPatch,
    options: t.Dict[str, Option],
    check: t.Callable[[], t.Iterator[str]],
    paths: t.List[str],
) -> None:
    monkeypatch.setitem(options, "newest", Option("path"))
    messages = list(check())
    assert [message.partition(":")[0] for message in messages] == paths
    assert all("newest" in message for message in messages)
