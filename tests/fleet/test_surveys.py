# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The surveys of AWX match the variables of the roles."""

from __future__ import annotations

import itertools
import pathlib
import typing as t

import pytest
import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from support import awx

ROOT = pathlib.Path(__file__).resolve().parents[2]
JOBS = ("prepare", "prune", "report")


def options(job: str) -> t.Dict[str, t.Any]:
    text = (ROOT / f"roles/{job}/meta/argument_specs.yml").read_text()
    found: t.Dict[str, t.Any] = yaml.safe_load(text)["argument_specs"]["main"]["options"]
    return found


def errors(job: str, answers: t.Mapping[str, t.Any]) -> t.List[str]:
    """The error messages of the role's own validation of these variables."""
    spec = {
        name: {
            key: value
            for key, value in option.items()
            if key not in ("description", "version_added")
        }
        for name, option in options(job).items()
    }
    result = ArgumentSpecValidator(spec).validate(dict(answers))
    return list(result.error_messages)


@pytest.mark.parametrize("job", JOBS)
def test_controller_accepts_the_survey(job: str) -> None:
    awx.check_survey(awx.survey_of(job))


@pytest.mark.parametrize("job", JOBS)
def test_every_question_sets_a_variable_of_the_role(job: str) -> None:
    assert {item["variable"] for item in awx.survey_of(job)["spec"]} <= set(options(job))


@pytest.mark.parametrize("job", JOBS)
def test_role_accepts_every_answer(job: str) -> None:
    spec = awx.survey_of(job)["spec"]
    answers = []
    for item in spec:
        assert not item["required"]
        assert "default" not in item
        values = [""] if item["type"] in ("text", "textarea") else []
        if item["type"] == "multiplechoice":
            values += item["choices"]
        elif item["type"] == "integer":
            values += [item["min"], item["max"]]
        else:
            values += ["none"]
        answers.append([(item["variable"], answer) for answer in values])
    for chosen in itertools.zip_longest(*answers):
        pairs = [pair or answers[index][0] for index, pair in enumerate(chosen)]
        assert errors(job, dict(pairs)) == []


@pytest.mark.parametrize("job", JOBS)
def test_choices_are_all_choices_of_the_role(job: str) -> None:
    for item in awx.survey_of(job)["spec"]:
        known = options(job)[item["variable"]]
        if item["type"] == "multiplechoice":
            assert item["choices"] == known.get("choices", ["true", "false"])
            assert ("choices" in known) != (known["type"] == "bool")


@pytest.mark.parametrize("job", JOBS)
def test_defaults_and_specs_have_the_same_variables(job: str) -> None:
    defaults = yaml.safe_load((ROOT / f"roles/{job}/defaults/main.yml").read_text())
    known = options(job)
    assert set(defaults) == set(known)
    for name, option in known.items():
        if "default" in option:
            assert option["default"] == defaults[name], name
    literal = {name: value for name, value in defaults.items() if "{{" not in str(value)}
    assert errors(job, literal) == []


def test_prune_has_all_options_of_layer_gc() -> None:
    text = (ROOT / "plugins/modules/layer_gc.py").read_text()
    documented = yaml.safe_load(text.partition('DOCUMENTATION = r"""')[2].partition('"""')[0])
    expected = {f"prune_{name}" for name in documented["options"]}
    own = {"prune_users", "prune_rootful", "prune_policies", "prune_schedule"}
    own |= {"prune_service_linger", "prune_service_python", "prune_ignore_variables"}
    # From the options for a store that all modules have.
    own |= {"prune_allow_untested_runtime"}
    assert set(options("prune")) == {*expected, *own}
